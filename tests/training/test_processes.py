"""Two processes train what one trains: same batches, same loss, same gradient, up to the order of the sums."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.modules.trainable_roles import ROLES, TrainableRoles
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.training.data.base import IndexedSamples, Windows
from llmcompress.training.data.batch import Sample
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.masks import ZerosStay
from llmcompress.training.settings import Training
from llmcompress.training.trainable_form import trainable_form
from tests.families import tiny_model, tiny_tokens
from tests.training.test_loop import KeptIn, weights

SETTINGS = Training(
    steps=4, batch=2, gradient_accumulation=3, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, validation=0.25
)
"""Six samples a step, of which there are seven: a step reaches from one pass over the data into the next."""


class Uneven(IndexedSamples):
    """Samples of several lengths, each with another number of learned tokens, one of them with none."""

    fingerprint = "uneven"
    count = 9

    def sample(self, index: int) -> Sample:
        ids = tiny_tokens("llama", batch=1, length=5 + index, seed=index)[0]
        return Sample(ids, torch.arange(len(ids)) >= (len(ids) if index == 4 else 4))


def one_training(keep: KeptIn | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = tiny_model("llama")
    context = RunContext(tiny_tokens("llama"), keep=keep, seed=3)  # type: ignore[arg-type]
    report = train(model, Uneven(), SETTINGS, context)
    assert report.validation_before is not None and report.validation_after is not None
    return weights(model), [*report.losses, report.validation_before, report.validation_after, report.tokens]


def one_training_of_codes() -> dict[str, torch.Tensor]:
    """Weights, scales and zero points of a quantized model, as `qat` trains them."""
    ids = tiny_tokens("llama")
    model = tiny_model("llama")
    rtn = PASSES["rtn"](scheme="int3_g32_asym", on_indivisible="pad")
    model = apply_passes(model, map_model(model), [rtn], RunContext(ids[:0])).model
    wanted = TrainableRoles(ROLES, keep_zeros=False, storage_dtype=torch.float32)
    with trainable_form(model, wanted) as found:
        job = Job("codes", parameters=[each for group in found.values() for each in group], masks=ZerosStay([]))
        train(model, Uneven(), SETTINGS.model_copy(update={"learning_rate": 5e-3}), RunContext(ids, seed=3), job=job)
    return {name: each.float() for name, each in model.state_dict().items() if name.endswith(("codes_OI", "scale_OG"))}


def work(folder: Path, rank: int) -> None:
    """One of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found, numbers = one_training(KeptIn(folder))
    again, same_numbers = one_training(KeptIn(folder))  # finished: restored, by both
    assert numbers == same_numbers and all(torch.equal(found[name], again[name]) for name in found)
    try:
        ids = tiny_tokens("llama", batch=4)
        train(tiny_model("llama"), Windows(ids), Training(steps=1, batch=3), RunContext(ids), job=Job("odd"))
    except CompressError as refused:
        assert refused.code == "training.batch"
    else:
        raise AssertionError("three samples do not divide among two processes")
    save_file(one_training_of_codes(), folder / f"codes-{rank}.safetensors")
    save_file({**found, "numbers": torch.tensor(numbers, dtype=torch.float64)}, folder / f"rank-{rank}.safetensors")
    distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    (alone, numbers), codes = one_training(), one_training_of_codes()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, other = (load_file(tmp_path / f"codes-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name, expected in codes.items():  # as below: signs decide steps; a weight between two codes may go to either
        assert torch.isclose(one[name], expected, rtol=0, atol=5e-4).float().mean() > 0.97, name
    torch.testing.assert_close(first.pop("numbers"), torch.tensor(numbers, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    moved = dict(tiny_model("llama").named_parameters())
    for name, weight in alone.items():
        # AdamW's first step is a gradient's sign: where it is all but zero the order of the sums decides it
        assert ((first[name] - weight).abs() < 2e-5).float().mean() > 0.995, name
        assert not torch.equal(moved[name], weight)
