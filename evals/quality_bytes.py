"""Picture of the real model's rows: docs/quality-bytes.svg, perplexity ÷ dense against megabytes, ours and the peers'.

    pip install matplotlib
    python evals/quality_bytes.py

Reads the result file that `real_trials.py` writes. Colours and transparency suit light and dark pages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator
from tables.paired import Facts, Method, chosen, methods, ratio
from tables.real import MODEL

HERE = Path(__file__).resolve().parent
GREY = "#808891"
COLOURS = {"ours": "#2f81f7", "llm-compressor": "#e8702a", "gptqmodel": "#a55ed6", "auto-round": "#2da44e"}
TICKS = (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100)
APART = 0.055
"""Least distance of two labels, as a share of the picture's height."""


class Point(NamedTuple):
    """One row of the table."""

    megabytes: float
    ratio: float
    error: float
    who: str
    label: str


@click.command()
@click.option("--most", default=12.0, show_default=True, help="perplexity ÷ dense up to which rows are shown")
def main(most: float) -> None:
    """Draw."""
    path = HERE / "results" / f"real-{MODEL}.json"
    points = points_of(json.loads(path.read_text(encoding="utf-8")), most)
    matplotlib.rcParams |= {"svg.hashsalt": "llmcompress", "svg.fonttype": "none", "text.color": GREY, "font.size": 9}
    figure, panel = pyplot.subplots(figsize=(8.4, 5.2), layout="constrained")
    panel.set_yscale("log")
    top = max(point.ratio + point.error for point in points)
    panel.set_ylim(0.97, top * 1.12)
    for point in points:
        style = {"color": COLOURS[point.who], "marker": "o" if point.who == "ours" else "D", "markersize": 6}
        panel.errorbar(point.megabytes, point.ratio, point.error, elinewidth=1, **style)
    for point, y in zip(points, label_places(points, math.log(top * 1.12 / 0.97)), strict=True):
        panel.annotate(
            point.label,
            (point.megabytes, point.ratio),
            (point.megabytes + 4, y),
            color=COLOURS[point.who],
            va="center",
            arrowprops={"arrowstyle": "-", "color": COLOURS[point.who], "linewidth": 0.5},
        )
    dress(panel, points, top)
    out = HERE.parent / "docs" / "quality-bytes.svg"
    figure.savefig(out, metadata={"Date": None}, transparent=True)
    click.echo(str(out))


def points_of(facts: Facts, most: float) -> list[Point]:
    """Every row on all blocks of the model; of ours the one chosen on validation text, where several compete."""
    rows = methods(facts)
    (dense,) = (row for row in rows if row.setting == "dense")
    found = []
    for row in rows:
        best = chosen(rows, row.setting, facts)
        if "blocks" in row.setting or (row.who == "ours" and best not in (None, row) and row.candidate):
            continue
        apart = ratio(row, dense, facts, facts["protocol"]["texts"])
        if apart.mean <= most:
            found.append(Point(row.trials[0]["bytes"] / 1e6, apart.mean, apart.error, row.who, label(row)))
    return sorted(found, key=lambda point: point.ratio)


def label(row: Method) -> str:
    """Who, how and what."""
    if row.setting == "dense":
        return "dense"
    bits = row.setting.partition("_")[0] if row.setting.startswith("int") else row.setting
    return f"{row.name}, {bits}" if row.who == "ours" else f"{row.who} {row.name}, {bits}"


def label_places(points: Sequence[Point], height: float) -> list[float]:
    """Where labels go up and down, for points from low to high: as far from the ones beside it as can be read."""
    places: list[float] = []
    step = math.exp(APART * height)
    for index, point in enumerate(points):
        near = [place for other, place in zip(points[:index], places, strict=True) if near_by(other, point)]
        places.append(max([point.ratio, *(place * step for place in near)]))
    return places


def near_by(first: Point, second: Point) -> bool:
    """Whether their labels could touch."""
    return abs(first.megabytes - second.megabytes) < 40


def dress(panel: pyplot.Axes, points: Iterable[Point], top: float) -> None:
    """Axes, ticks and what they mean."""
    most = max(point.megabytes for point in points)
    panel.set_xlim(0.9 * min(point.megabytes for point in points), most * 1.22)
    panel.yaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick <= top * 1.1]))
    panel.yaxis.set_major_formatter(FixedFormatter([f"×{tick:g}" for tick in TICKS]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("megabytes of weights; the token embedding is 57 MB of them unless a label says int8", color=GREY)
    panel.set_ylabel("perplexity ÷ dense, both texts", color=GREY)
    panel.tick_params(colors=GREY)
    panel.grid(which="major", alpha=0.25, color=GREY)
    for side in panel.spines.values():
        side.set_color(GREY)


if __name__ == "__main__":
    main()
