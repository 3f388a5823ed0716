"""W8A8 with and without SmoothQuant after outlier channels were injected without changing the function.

    python evals/outliers.py --model builtin:books-llama --name books-llama

The loudest channel of every norm that feeds linears (by its largest activation) gets a 30 times larger gain and the
linears' columns shrink by as much: the model computes what it did, but its activations now have the outliers of large
models. Writes evals/results/outliers-NAME.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.stream import BlockStream
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.numerics.statistics import AbsMax
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

RECIPES = {
    "naive W8A8, per tensor": "- rtn: {scheme: int8_channel_a8tensor}",
    "naive W8A8, per token": "- rtn: {scheme: int8_channel_a8token}",
    "smoothquant W8A8, per tensor": "- smoothquant: {strength: 0.5}\n- rtn: {scheme: int8_channel_a8tensor}",
    "smoothquant W8A8, per token": "- smoothquant: {strength: 0.5}\n- rtn: {scheme: int8_channel_a8token}",
    "smoothquant → gptq W8A8, per token": "- smoothquant: {strength: 0.5}\n- gptq: {scheme: int8_channel_a8token}",
}


def inject(model: PreTrainedModel, model_map: ModelMap, windows_NT: Tensor, *, channels: int, gain: float) -> None:
    """Multiply the loudest channels of every folded norm by `gain`, and divide the columns that read them."""
    stream = BlockStream(
        model,
        model_map,
        RunContext(windows_NT, batch=8),
    )
    for work in stream:
        work.measure(work.sites, (AbsMax,))
        for fold in work.folds_into(work.sites):
            if fold.producer_is_norm:
                loudness_C = work.site(fold.consumers[0]).statistic(AbsMax).max_I
                divide_P = torch.ones(work.producer_channels(fold))
                divide_P[torch.tensor(fold.channel_map)[loudness_C.topk(channels).indices]] = 1 / gain
                work.fold(fold, divide_P)


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--gain", default=30.0, show_default=True)
@click.option("--channels", default=1, show_default=True, help="outlier channels of every norm")
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=200, show_default=True)
def main(
    model: str, calibration: str, text: str, name: str, gain: float, channels: int, window: int, max_windows: int
) -> None:
    """Measure every recipe on the model with outliers."""
    task = PerplexityTask(source=text, window=window, bos="always", max_windows=max_windows)
    source, device = find_source(model), torch.device("cpu")
    rows = []
    for label, passes in {"dense": "", **RECIPES}.items():
        loaded = load_for_compression(source, dtype=torch.float32)
        model_map = map_model(loaded.model)
        settings = Calibration(source=calibration, samples=64, tokens=256)
        data = calibration_windows(settings, loaded.tokenizer, max_positions=window, seed=0, progress=Silent())
        inject(loaded.model, model_map, data.windows_NT, channels=channels, gain=gain)
        if passes:
            apply_passes(
                loaded.model,
                model_map,
                parse_recipe("passes:\n" + passes, "evals").passes,
                RunContext(data.windows_NT, batch=8, device=device),
            )
        result = perplexity(loaded.model, loaded.tokenizer, task, device=device, progress=Silent())
        rows.append({"method": label, "perplexity": result.perplexity})
        click.echo(f"{label:36s} {result.perplexity:.3f}", err=True)
    facts = {
        "model": name,
        "gain": gain,
        "channels": channels,
        "text": Path(text).name,
        "window": window,
        "bos": True,
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"outliers-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
