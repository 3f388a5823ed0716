"""What evaluating costs beside a bare forward loop: tokens per second of perplexity and KL as a share of that loop's.

    OMP_NUM_THREADS=1 python evals/evaluation_speed.py --model FOLDER --name smollm2

Each pair runs both on the same windows, one after the other, in alternating order, in CPU seconds: what else happens on
the machine counts for both. `dense` scores the 64 most likely tokens and the perplexity; `compared` scores those tokens
again, as of a compressed model, and computes everything reported, intervals included. The compressed model is the
same one: what it computes with is not what is timed. Writes evals/results/evaluation-speed-NAME.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.metrics.base import Observation, Subject
from llmcompress.evaluation.metrics.perplexity import PerplexityMetric
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load
from llmcompress.numerics.loss import windows_at_once
from llmcompress.progress import Silent
from llmcompress.runners.torch_runner import TorchRunner

RESULTS = Path(__file__).parent / "results"


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def share_of(bare: Callable[[], object], measured: Callable[[], object], pairs: int) -> dict[str, object]:
    """Bare seconds ÷ measured seconds of every pair, and their median."""
    shares = []
    for number in range(pairs):
        if number % 2:
            after = cpu_seconds(measured)
            before = cpu_seconds(bare)
        else:
            before = cpu_seconds(bare)
            after = cpu_seconds(measured)
        shares.append(round(before / after, 4))
    return {"share": statistics.median(shares), "pairs": shares}


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--windows", default=4, show_default=True)
@click.option("--pairs", default=5, show_default=True)
@click.option("--name", required=True)
def main(model: str, text: str, window: int, windows: int, pairs: int, name: str) -> None:
    """Time perplexity and KL of one model against its own forward passes."""
    loaded = load(model, dtype=torch.float32)
    rows = loaded.model.config.get_text_config().vocab_size
    task = PerplexityTask(source=text, window=window, max_windows=windows)
    (metric,) = PerplexityMetric.prepare([task], Subject(loaded.tokenizer, None, rows))
    with TorchRunner(loaded.model) as runner:
        ids_NW = torch.stack([each for each in metric.text.windows if len(each) == window])
        batches = ids_NW.split(windows_at_once(window, rows))

        def bare() -> None:
            for ids_BW in batches:
                runner.logits(ids_BW)

        def dense() -> Observation:
            return metric.observe(runner, Silent(), dense=None)

        def compared() -> None:
            metric.compared(reference, metric.observe(runner, Silent(), dense=reference))

        reference = dense()
        bare()
        found = {
            "model": Path(model).name,
            "vocabulary": rows,
            "tokens": ids_NW.numel(),
            "window": window,
            "top": metric.top,
            "threads": torch.get_num_threads(),
            "tokens_per_second_bare": round(ids_NW.numel() / cpu_seconds(bare), 1),
            "dense": share_of(bare, dense, pairs),
            "compared": share_of(bare, compared, pairs),
            "versions": versions(),
            "machine": machine(),
        }
    (RESULTS / f"evaluation-speed-{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps({key: found[key] for key in ("tokens_per_second_bare", "dense", "compared")}))


if __name__ == "__main__":
    main()
