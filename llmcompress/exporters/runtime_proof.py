"""Runs exported files in their own runtime, beside the same model in PyTorch: logits, greedy tokens, perplexity, speed.

P = predicted tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.errors import CompressError
from llmcompress.evaluation.device.peak_memory import MemoryRequest, peak_memory
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import evaluation_text
from llmcompress.exporters.base import Exporter
from llmcompress.exporters.dense_speed import decode_to_dense
from llmcompress.progress import LOG
from llmcompress.records.cost import Memory
from llmcompress.records.export_report import RuntimeProof
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.torch_runner import TorchRunner

_WINDOW, _WINDOWS = 256, 4
_PROMPT, _GREEDY = 32, 24
TEXT = "builtin:evaluation"


def runtime_proof(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exporter: Exporter,
    folder: Path,
    *,
    with_memory: bool = False,
) -> RuntimeProof | None:
    """What the runtime computes with a folder, on about 1,000 tokens; None where it is not installed, or where the
    target has no runner, which is logged.

    `with_memory`: a fresh process, which holds nothing else, opens the folder once more and says how much memory it
    takes.

    Raises: CompressError where the runtime cannot load the files.
    """
    if exporter.cannot_run is not None:
        LOG.info(f"the exported files were not run here: {exporter.cannot_run}")
        return None
    try:
        runner = exporter.runner().open(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    except CompressError as problem:
        if problem.code != "runner.package":
            raise
        LOG.warning(f"the exported files were not run: {problem.what}; {problem.fix}")
        return None
    with runner, TorchRunner(model) as reference:
        task = PerplexityTask(source=TEXT, window=_WINDOW, max_windows=_WINDOWS, bos="never")
        text = evaluation_text(task, tokenizer, runner.max_positions)
        found = compare(runner, reference, text.windows, text=text.name)
        prompt, count = _beginning(runner, text.windows[0])
        found = found.model_copy(update={"decode_to_dense": decode_to_dense(runner, model, prompt, count)})
    return found.model_copy(update={"memory": _memory(exporter, folder)}) if with_memory else found


def _memory(exporter: Exporter, folder: Path) -> Memory:
    request = MemoryRequest(
        model=str(folder),
        runtime=RUNNERS.name_of(exporter.runner()),
        device="cpu",
        dtype="float32",
        threads=torch.get_num_threads(),
        settings=((1, _PROMPT),),
        new_tokens=_GREEDY,
    )
    (found,) = peak_memory(request)
    return found


@torch.inference_mode()
def compare(runner: Runner, reference: Runner, windows: Sequence[Tensor], *, text: str) -> RuntimeProof:
    """Both on the same windows, one window at a time."""
    largest, difference, same, kl, nats, reference_nats = 0.0, 0.0, 0, 0.0, 0.0, 0.0
    tokens, seconds = 0, 0.0
    for window in windows:
        begun = time.perf_counter()
        found_PV = runner.logits(window[None])[0, :-1].float().cpu()
        seconds += time.perf_counter() - begun
        wanted_PV = reference.logits(window[None])[0, :-1].float().cpu()
        apart_PV = (found_PV - wanted_PV).abs_()
        largest, difference = max(largest, float(apart_PV.max())), difference + float(apart_PV.mean(-1).sum())
        same += int((found_PV.argmax(-1) == wanted_PV.argmax(-1)).sum())
        found_PV, wanted_PV = found_PV.log_softmax(-1), wanted_PV.log_softmax(-1)
        kl += float((wanted_PV.exp() * (wanted_PV - found_PV)).sum(dtype=torch.float64))
        targets_P1 = window[1:, None].long()
        nats -= float(found_PV.gather(-1, targets_P1).sum(dtype=torch.float64))
        reference_nats -= float(wanted_PV.gather(-1, targets_P1).sum(dtype=torch.float64))
        tokens += len(targets_P1)
    perplexities = torch.tensor([reference_nats / tokens, nats / tokens], dtype=torch.float64).exp().tolist()
    generated, decode = _greedy(runner, reference, windows[0])
    return RuntimeProof(
        runtime=runner.name,
        text=text,
        window=max(map(len, windows)),
        tokens=tokens,
        largest_logit_difference=largest,
        mean_logit_difference=difference / tokens,
        same_top=same / tokens,
        kl=kl / tokens,
        perplexity_model=perplexities[0],
        perplexity_runtime=perplexities[1],
        greedy_tokens=generated[0],
        greedy_same=generated[1],
        prefill_tokens_per_second=(tokens + len(windows)) / seconds,
        decode_tokens_per_second=decode,
    )


def _beginning(runner: Runner, window: Tensor) -> tuple[Tensor, int]:
    """A prompt, and how many tokens follow it."""
    most = runner.max_positions or _PROMPT + _GREEDY
    prompt_T = window[: max(1, min(_PROMPT, most // 2))]
    return prompt_T, min(_GREEDY, most - len(prompt_T))


def _greedy(runner: Runner, reference: Runner, window: Tensor) -> tuple[tuple[int, int], float]:
    """Tokens that both generate after the beginning of a window, how many of them are the same, and the speed."""
    prompt_T, count = _beginning(runner, window)
    prompt = prompt_T.tolist()
    begun = time.perf_counter()
    (found,) = runner.generate([prompt], max_new_tokens=1)
    first = time.perf_counter()
    (found,) = runner.generate([prompt], max_new_tokens=count)
    seconds = (time.perf_counter() - first) - (first - begun)
    (wanted,) = reference.generate([prompt], max_new_tokens=count)
    same = next((place for place in range(count) if found[place] != wanted[place]), count)
    return (count, same), (count - 1) / seconds if seconds > 0 else 0.0
