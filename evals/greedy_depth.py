"""How many blocks a greedy depth search must evaluate in every round: a quarter of a real model's blocks removed.

    OMP_NUM_THREADS=1 python evals/greedy_depth.py --calibration wikitext-2/valid.txt \\
        --text WikiText-2=wikitext-2/test.txt --text books=books/test.txt --validation books-valid=books/valid.txt

`screen` evaluates the blocks of least influence only; without it all blocks are evaluated in every round. The choice is
made on validation text. Writes evals/results/greedy-depth-NAME.json after every row, with the losses of every window,
and goes on where it was stopped. Set OMP_NUM_THREADS=1: seconds are CPU seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from qat import dense_nats, shown
from real_model import real_model
from real_trials import Results, named
from study import Bench, Study, study_options

from llmcompress.storage.paths import cache_folder

HERE = Path(__file__).resolve().parent
SAMPLES = 4
"""Of 512 tokens."""
GREEDY: dict[str, Any] = {"fraction": 0.25, "score": "perplexity", "mode": "greedy"}
ROWS: dict[str, dict[str, Any]] = {
    "block influence": {"fraction": 0.25},
    "block influence, greedy": {"fraction": 0.25, "mode": "greedy"},
    "perplexity": {"fraction": 0.25, "score": "perplexity"},
    **{f"perplexity, greedy, screen {screen}": {**GREEDY, "screen": screen} for screen in (4, 6, 10)},
    "perplexity, greedy": GREEDY,
}


@click.command()
@study_options(chosen="the number is", only="rows")
def main(
    model: Path | None,
    name: str,
    calibration: Path,
    texts: Sequence[str],
    validation: Sequence[str],
    only: Sequence[str],
) -> None:
    """Do what is missing."""
    cache = cache_folder() / "evals"
    study = Study(model or real_model(), calibration, named(texts), named(validation), cache, samples=SAMPLES)
    results, bench = Results(HERE / "results" / f"greedy-depth-{name}.json", study), Bench(study)
    names = [*study.texts, *study.validation]
    for method, options in ROWS.items():
        if (only and method not in only) or any(method == trial["method"] for trial in results.trials):
            continue
        compressed, taken = bench.compress([{"depth": options}], 0)
        found = {
            "texts": bench.measure(compressed, names),
            "dense_nats": {each: dense_nats(bench, each) for each in names},
        }
        results.add(bench, {"method": method, "options": options, **taken, **found})
        click.echo(f"{method}: {shown(results.trials[-1])}", err=True)
    click.echo(str(results.path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
