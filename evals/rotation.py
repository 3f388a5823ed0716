"""Rotation, Outlier Suppression+ and reordering against plain rounding, without and with injected outlier channels.

    python evals/rotation.py --name books-llama

Outliers are injected as in `outliers.py`: the model computes what it did. W4A4 and W4A8 of `reorder` round inputs on
static grids; schemes ending in `_a8token` round them per token, `_a8tensor` on one static grid.
Writes evals/results/rotation-NAME.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
import torch
from outliers import inject

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

WEIGHTS = {
    f"{label} {scheme}": f"[{first.format(scheme=scheme)}{{{quantizer}: {{scheme: {scheme}}}}}]"
    for scheme in ("int4_channel", "int3_channel")
    for label, first, quantizer in (
        ("rtn", "", "rtn"),
        ("rotation → rtn", "rotation, ", "rtn"),
        ("random rotation → rtn", "{{rotation: {{basis: random}}}}, ", "rtn"),
        ("rotation, online → rtn", "{{rotation: {{online: true}}}}, ", "rtn"),
        ("gptq", "", "gptq"),
        ("rotation → gptq", "rotation, ", "gptq"),
        ("awq → gptq", "{{awq: {{scheme: {scheme}, round: false}}}}, ", "gptq"),
        ("rotation → learned rounding", "rotation, ", "learned_rounding"),
    )
}

ACTIVATIONS = {
    f"{label} {scheme}": f"[{first.format(scheme=scheme)}{{rtn: {{scheme: {scheme}}}}}]"
    for scheme in ("int8_channel_a8tensor", "int8_channel_a8token", "int4_channel_a8token")
    for label, first in (
        ("naive", ""),
        ("smoothquant", "smoothquant, "),
        ("outlier_suppression", "{{outlier_suppression: {{scheme: {scheme}}}}}, "),
        ("rotation", "rotation, "),
        ("rotation, online", "{{rotation: {{online: true}}}}, "),
    )
}

REORDER = {
    f"reorder {clusters} W{weights}A{bits}": f"[{{reorder: {{clusters: {clusters}, bits: {bits}}}}}, {quantizer}]"
    for weights, bits, quantizer in (
        (8, 8, "{rtn: {scheme: int8_channel}}"),
        (4, 8, "{gptq: {scheme: int4_channel}}"),
        (4, 4, "{gptq: {scheme: int4_channel}}"),
    )
    for clusters in (1, 8, 32)
}

FOUR_BITS = {
    f"{label} {scheme}": f"[{first}{{gptq: {{scheme: {scheme}}}}}]"
    for scheme in ("int4_channel_a8token", "int4_g64_a8token", "nvfp4_a", "mxfp4_a")
    for label, first in (
        ("gptq", ""),
        ("smoothquant → gptq", "smoothquant, "),
        ("rotation → gptq", "rotation, "),
        ("rotation, online → gptq", "{rotation: {online: true}}, "),
    )
} | {
    f"{label}reorder 32 W4A4": f"[{first}{{reorder: {{clusters: 32, bits: 4}}}}, {{gptq: {{scheme: int4_channel}}}}]"
    for label, first in (("", ""), ("rotation → ", "rotation, "))
}
"""Weights of 4 bits, inputs of 8 (`_a8token`) and of 4 (floats in groups, `_a`, and `reorder`)."""

KINDS = {"four_bits": FOUR_BITS, "weights": WEIGHTS, "activations": ACTIVATIONS, "reorder": REORDER}


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([*KINDS]),
    default=("weights", "activations", "reorder"),
    show_default=True,
)
@click.option("--gain", "gains", multiple=True, type=float, default=(1.0, 30.0), show_default=True, help="1: none")
@click.option("--seeds", default=1, show_default=True, help="calibration draws")
@click.option("--samples", default=64, show_default=True, help="calibration windows")
@click.option("--tokens", default=256, show_default=True, help="of a calibration window")
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=100, show_default=True)
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    kinds: tuple[str, ...],
    gains: tuple[float, ...],
    seeds: int,
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
) -> None:
    """Measure every recipe on the model as it is and with outliers."""
    task = PerplexityTask(source=text, window=window, bos="always", max_windows=max_windows)
    source, cpu = find_source(model), torch.device("cpu")
    rows: list[dict[str, object]] = []
    path = Path(__file__).parent / "results" / f"rotation-{name}.json"

    def measured(passes: str, gain: float, seed: int) -> float:
        loaded = load_for_compression(source, dtype=torch.float32)
        settings = Calibration(source=calibration, samples=samples, tokens=tokens)
        data = calibration_windows(settings, loaded.tokenizer, max_positions=window, seed=seed, progress=Silent())
        model_map = map_model(loaded.model)
        if gain != 1:
            inject(loaded.model, model_map, data.windows_NT, channels=1, gain=gain)
        found = loaded.model
        if passes:
            found = apply_passes(
                loaded.model,
                model_map,
                parse_recipe(f"passes: {passes}", "evals").passes,
                RunContext(data.windows_NT, batch=8, device=cpu, seed=seed),
            ).model
        return perplexity(found, loaded.tokenizer, task, device=cpu, progress=Silent()).perplexity

    for gain in gains:
        recipes = {"dense": ""} | {label: passes for kind in kinds for label, passes in KINDS[kind].items()}
        for label, passes in recipes.items():
            found = [measured(passes, gain, seed) for seed in range(seeds if passes else 1)]
            rows.append({"gain": gain, "method": label, "perplexity": found})
            click.echo(f"gain {gain:4g}  {label:48s} {statistics.mean(found):9.3f}", err=True)
            facts = {
                "model": name,
                "text": Path(text).name,
                "calibration": f"{samples} × {tokens} tokens of {Path(calibration).name}",
                "window": window,
                "bos": True,
                "rows": rows,
                "versions": versions(),
                "machine": machine(),
            }
            path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
