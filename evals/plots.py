"""Pictures of results: docs/growth.svg, how the seconds of compressing grow with blocks, width and samples.

    pip install matplotlib
    python evals/plots.py

Reads evals/results/seconds.json, which `peers/seconds.py --growth` writes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import click
import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter, ScalarFormatter

HERE = Path(__file__).parent


@click.command()
def main() -> None:
    """Draw, on two logarithmic axes: a power is a straight line there, and its exponent the slope."""
    matplotlib.rcParams["svg.hashsalt"] = "llmcompress"  # the same file from the same numbers
    series = defaultdict(list)
    for row in json.loads((HERE / "results" / "seconds.json").read_text())["growth"]:
        series[row["by"]].append(row)
    figure, panels = pyplot.subplots(1, len(series), figsize=(4 * len(series), 3.4), layout="constrained")
    for panel, (what, rows) in zip(panels, series.items(), strict=True):
        for row in rows:
            panel.loglog(row["values"], row["seconds"], "o-", label=f"{row['method']}: exponent {row['exponent']:.2f}")
        panel.set_xticks(rows[0]["values"])
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        panel.set_yticks([5, 10, 20, 40, 80])
        panel.set_xlabel({"samples": "samples of 512 tokens"}.get(what, what))
        panel.legend(fontsize=8)
        panel.grid(which="major", alpha=0.3)
    panels[0].set_ylabel("CPU seconds of one thread")
    path = HERE.parent / "docs" / "growth.svg"
    figure.savefig(path, metadata={"Date": None})
    click.echo(str(path))


if __name__ == "__main__":
    main()
