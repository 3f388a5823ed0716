"""Picture of how optimizers compare on the table of a small space: docs/optimizers.svg, regret by forward tokens.

    pip install matplotlib
    python evals/optimizers_plot.py

Reads evals/results/optimizers-books-llama.json, which `optimizers.py` writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
GREY = "#808891"
PANELS: dict[str, tuple[str, ...]] = {
    "baselines and evolution": ("random", "aging evolution", "EvoPress-like", "NSGA-II", "transformations", "shells"),
    "models of the loss": ("random", "TPE", "Gaussian process", "BANANAS-like", "APQ-like"),
    "gradients and sums": ("random", "RCO-like", "DARTS-like", "policy gradient", "exact on estimates"),
}
COLOURS = ("#2f81f7", "#e8702a", "#2da44e", "#a55ed6", "#d4a72c")


@click.command()
@click.option("--name", default="books-llama", show_default=True)
def main(name: str) -> None:
    """Draw."""
    facts = json.loads((HERE / "results" / f"optimizers-{name}.json").read_text(encoding="utf-8"))
    rows = {row["optimizer"]: row for row in facts["rows"]}
    matplotlib.rcParams |= {"svg.hashsalt": "llmcompress", "svg.fonttype": "none", "text.color": GREY, "font.size": 9}
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 4), sharey=True, layout="constrained")
    for panel, (title, labels) in zip(panels, PANELS.items(), strict=True):
        colours = iter(COLOURS)
        for label in (each for each in labels if each in rows):
            draw(panel, rows[label], GREY if label == "random" else next(colours))
        panel.set_title(title, color=GREY)
        panel.set_xscale("log")
        panel.set_xlabel("forward tokens, in evaluations of one plan", color=GREY)
        panel.tick_params(colors=GREY)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color(GREY)
        panel.legend(frameon=False, labelcolor=GREY)
    panels[0].set_ylabel("log(loss ÷ least loss), mean ± standard error", color=GREY)
    panels[0].set_ylim(bottom=0)
    out = HERE.parent / "docs" / "optimizers.svg"
    figure.savefig(out, metadata={"Date": None}, transparent=True)
    click.echo(str(out))


def draw(panel: Any, row: dict[str, Any], colour: str) -> None:
    """One curve with its standard error."""
    mean = np.array([np.nan if each is None else each for each in row["curve"]])
    error = np.array([np.nan if each is None else each for each in row["error"]])
    spent = np.arange(1, len(mean) + 1)
    panel.plot(spent, mean, color=colour, label=row["optimizer"], linewidth=1.4)
    panel.fill_between(spent, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


if __name__ == "__main__":
    main()
