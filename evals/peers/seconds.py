"""What compressing costs, ours and llm-compressor's: CPU seconds of one thread ÷ those of plain forward passes.

    OMP_NUM_THREADS=1 python evals/peers/seconds.py --environments FOLDER
    OMP_NUM_THREADS=1 python evals/peers/seconds.py --growth

A Llama of 110 M random weights (costs do not depend on them), float32. A forward pass over the same calibration tokens,
logits included, is timed right before and after every method in the same process, because the speed of a shared machine
drifts. Mapping, loading and saving are left out. Every run adds one measurement to the rows it is asked for (`--again`:
forgets what it measures anew first); without `--environments` only ours are measured. `--growth`: how the seconds of
gptq and awq grow with samples, blocks and width, and the exponents. Writes evals/results/seconds.json after every
measurement.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import click
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from venvs import run_in

from llmcompress.calibration.context import RunContext
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import measure
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.recipe import parse_recipe
from llmcompress.runners.torch_runner import TorchRunner


class Method(NamedTuple):
    """What is timed."""

    passes: str
    peer: str = ""
    """What `llm_compressor.py` is asked for, the same thing."""
    samples: tuple[int, ...] = (8,)
    """Of 512 tokens."""
    mixed_precision: Literal["bf16"] | None = None
    """As in `calibration`; the forward passes that it is compared with stay in float32."""


MEASURED = {
    "rtn int4_g128": Method("rtn: {scheme: int4_g128}"),
    "gptq int4_g128": Method("gptq: {scheme: int4_g128}", "--method gptq --bits 4 --group 128", (8, 32)),
    "smoothquant → gptq int8": Method(
        "smoothquant: {}\n- gptq: {scheme: int8_channel_a8token}",
        "--method smoothquant→gptq --bits 8 --activations 8",
    ),
    "wanda 50 %": Method("wanda: {sparsity: 0.5}", "--method wanda --sparsity 0.5"),
    "wanda 2:4": Method('wanda: {pattern: "2:4"}', "--method wanda --sparsity 0.5 --structure 2:4"),
    "sparsegpt 50 %": Method("sparsegpt: {sparsity: 0.5}", "--method sparsegpt --sparsity 0.5"),
    "sparsegpt 2:4": Method('sparsegpt: {pattern: "2:4"}', "--method sparsegpt --sparsity 0.5 --structure 2:4"),
    "slicegpt 25 %": Method("slicegpt: {fraction: 0.25}"),
    "awq int4_g128_asym": Method("awq: {scheme: int4_g128_asym}", "--method awq --bits 4 --group 128 --asymmetric"),
}
METHODS = {
    **MEASURED,
    **{
        f"{name}, bf16": MEASURED[name]._replace(peer="", mixed_precision="bf16")
        for name in MEASURED
        if MEASURED[name].peer and "2:4" not in name
    },
}
EVALUATION = "perplexity"
"""A row of its own: what measuring costs, logits and loss and all."""
GROWTH = ("gptq int4_g128", "awq int4_g128_asym")
BASE = {"blocks": 4, "width": 768, "samples": 8}
SERIES = {"blocks": (2, 4, 8, 12), "width": (384, 768, 1152, 1536), "samples": (4, 8, 16, 32)}
PATH = Path(__file__).parent.parent / "results" / "seconds.json"


@click.command()
@click.option("--growth", is_flag=True, help="measure growth instead of the table of methods")
@click.option("--environments", type=Path, help="where peers' environments are kept")
@click.option("--only", multiple=True, type=click.Choice([*METHODS, EVALUATION]), help="default: everything")
@click.option("--again", is_flag=True, help="forget what is measured anew")
def main(growth: bool, environments: Path | None, only: tuple[str, ...], again: bool) -> None:
    """Measure, and keep what the file has of the rest."""
    torch.set_num_threads(1)
    facts: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {"rows": [], "growth": []}
    if growth:
        facts["growth"] = []
        for name in GROWTH:
            for what, values in SERIES.items():
                sizes = [{**BASE, what: value} for value in values]
                seconds = [
                    ours(METHODS[name], llama(size["blocks"], size["width"]), tokens(size["samples"])).seconds
                    for size in sizes
                ]
                row = {"method": name, "by": what, "values": values, "seconds": seconds}
                facts["growth"].append(row | {"exponent": slope(values, seconds)})
                click.echo(str(facts["growth"][-1]), err=True)
                write(facts)
        return
    for row in facts["rows"] if again else ():
        if not only or row["method"] in only:
            row |= {"ours": [], "peer": []} if environments else {"ours": []}

    def row_of(method: str, samples: int) -> dict[str, Any]:
        for row in facts["rows"]:
            if (row["method"], row["samples"]) == (method, samples):
                return dict(row)
        return {"method": method, "samples": samples, "ours": [], "peer": []}

    def add(row: dict[str, Any], who: str, timed: Timed) -> None:
        row[who] = [*row[who], timed.seconds / timed.forward]
        rows = [each for each in facts["rows"] if (each["method"], each["samples"]) != (row["method"], row["samples"])]
        facts["rows"] = [*rows, row]
        click.echo(f"{row} forward {timed.forward:.2f} s", err=True)
        write(facts)

    model = llama(12, 768)
    with tempfile.TemporaryDirectory() as folder:
        if environments:
            model.save_pretrained(folder)
            for file in find_source("builtin:books-llama").folder.glob("tokenizer*"):
                (Path(folder) / file.name).write_bytes(file.read_bytes())  # the peer asks for one and does not use it
        for name, method in METHODS.items():
            for samples in method.samples if not only or name in only else ():
                row, windows_NT = row_of(name, samples), tokens(samples)
                add(row, "ours", ours(method, model, windows_NT))
                if environments and method.peer:
                    timed, facts["peer_versions"] = theirs(method, Path(folder), windows_NT, environments)
                    add(row, "peer", timed)
    if not only or EVALUATION in only:
        add(row_of(EVALUATION, 8), "ours", evaluation(model, tokens(8)))


class Timed(NamedTuple):
    """CPU seconds of some work, and of one plain forward pass over the same tokens at the same time."""

    seconds: float
    forward: float


def llama(blocks: int, width: int) -> PreTrainedModel:
    """A model of random weights; 12 blocks of width 768 are 110 M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def tokens(samples: int) -> Tensor:
    """Random token ids, samples × 512."""
    return torch.randint(3, 32000, (samples, 512), generator=torch.Generator().manual_seed(0))


def ours(method: Method, model: PreTrainedModel, windows_NT: Tensor) -> Timed:
    """Our passes on a copy of the model."""
    chosen = parse_recipe("passes:\n- " + method.passes, "evals").passes
    uses_data = any(each.uses_data() for each in chosen)
    model_map = map_model(model)
    before = forward(model, windows_NT)
    tried = copy.deepcopy(model)
    began = time.process_time()
    apply_passes(
        tried,
        model_map,
        chosen,
        RunContext(
            windows_NT if uses_data else windows_NT[:0],
            batch=8,
            storage_dtype=torch.float16,
            mixed_precision=method.mixed_precision,
        ),
    )
    seconds = time.process_time() - began
    return Timed(seconds, mean([before, forward(model, windows_NT)]))


def theirs(method: Method, model: Path, windows_NT: Tensor, environments: Path) -> tuple[Timed, dict[str, str]]:
    """The peer in a process of its own; and its versions."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "windows.safetensors"
        save_file({"windows": windows_NT}, data)
        options = [*method.peer.split(), "--windows", str(data), "--forwards", "1"]
        found = run_in("llm-compressor", "llm_compressor.py", [str(model), *options], folder=environments)
    return Timed(found["cpu_seconds"], mean(found["forward_cpu_seconds"])), found["versions"]


def evaluation(model: PreTrainedModel, windows_NT: Tensor) -> Timed:
    """Our perplexity over the same tokens."""
    text = EvaluationText("random", "", tuple(windows_NT), windows_NT.shape[1], True, 1, frozenset())
    before = forward(model, windows_NT)
    began = time.process_time()
    with TorchRunner(model) as runner:
        measure(runner, text)
    seconds = time.process_time() - began
    return Timed(seconds, mean([before, forward(model, windows_NT)]))


@torch.no_grad()
def forward(model: PreTrainedModel, windows_NT: Tensor) -> float:
    """CPU seconds of one plain pass over all windows."""
    began = time.process_time()
    for ids_BT in windows_NT.split(8):
        model(input_ids=ids_BT, use_cache=False)
    return time.process_time() - began


def slope(values: tuple[int, ...], seconds: list[float]) -> float:
    """The exponent p of seconds ∝ valueᵖ, by least squares on logarithms."""
    x, y = [math.log(value) for value in values], [math.log(each) for each in seconds]
    mean_x, mean_y = mean(x), mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def write(facts: dict[str, Any]) -> None:
    """The result file."""
    facts |= {"tokens": 512, "parameters": 110_000_000, "versions": versions(), "machine": machine()}
    PATH.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
