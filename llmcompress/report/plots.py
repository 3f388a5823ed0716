"""The drawings of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmcompress.records.inside import Distribution, TokenDivergences
from llmcompress.report.svg import GRID, INK, MUTED, SERIES, as_svg, new_figure

MOST_KINDS = 8
"""Kinds of linear that are drawn."""


@dataclass(frozen=True)
class Point:
    """One model in a plane of two numbers."""

    name: str
    x: float
    y: float
    spread: tuple[float, float] | None = None
    """95 % interval of y."""


def heat_map(
    values: Mapping[tuple[int, str], float], columns: Sequence[str], *, name: str, logarithmic: bool
) -> tuple[str, float, float]:
    """Block × kind of linear, the larger the darker; with the smallest and the largest value."""
    from matplotlib.colors import to_rgb

    blocks = sorted({block for block, _ in values})
    low, high = min(values.values()), max(values.values())

    def darkness(value: float) -> float:
        if high <= low:
            return 0.5
        if logarithmic:
            floor = max(low, high / 1e4)
            return min(1.0, 0.08 + 0.92 * math.log(max(value, floor) / floor) / math.log(high / floor))
        return min(1.0, 0.08 + 0.92 * (value - low) / (high - low))

    figure, axes = new_figure(4.4, 1.1 + 0.16 * len(blocks))
    ink = to_rgb(SERIES[0])
    for (block, kind), value in values.items():
        row, column = blocks.index(block), list(columns).index(kind)
        colour = (*ink, darkness(value))
        axes.bar(column, 0.92, 0.94, bottom=row - 0.46, color=[colour], edgecolor="none")
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(blocks) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), [_short(kind) for kind in columns], rotation=35, ha="right")
    step = max(1, -(-len(blocks) // 16))
    axes.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_ylabel("block", color=MUTED, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return as_svg(figure, name), low, high


def distributions(found: Sequence[Distribution], *, name: str) -> str:
    """Small multiples: every kind of linear, dense behind compressed."""
    kinds = list(dict.fromkeys(each.sites for each in found))[:MOST_KINDS]
    rows = -(-len(kinds) // 2)
    figure, axes = new_figure(4.4, 0.3 + 1.25 * rows, rows=max(rows, 1), columns=2)
    for place, axis in enumerate(axes.flat):
        if place >= len(kinds):
            axis.set_visible(False)
            continue
        axis.set_title(_short(kinds[place]), fontsize=9, color=INK, loc="left")
        axis.grid(visible=False)
        axis.set_yticks([])
        axis.tick_params(labelsize=7.5)
        for each in found:
            if each.sites == kinds[place]:
                _histogram(axis, each)
    return as_svg(figure, name)


def by_position(found: TokenDivergences, *, name: str) -> str:
    """Mean KL along the windows."""
    figure, axes = new_figure(4.4, 2.3)
    places = [(each.first + each.last) / 2 for each in found.positions]
    axes.plot(places, [each.kl for each in found.positions], color=SERIES[0], linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the window", color=MUTED, fontsize=9)
    axes.set_ylabel("KL, nats per token", color=MUTED, fontsize=9)
    return as_svg(figure, name)


def front(points: Sequence[Point], *, x: str, y: str, larger_x_is_better: bool, name: str) -> str:
    """Every run as a point, and the line of those that no other run beats in both numbers; lower y is better."""
    figure, axes = new_figure(4.4, 3.2)
    best = pareto(points, larger_x_is_better=larger_x_is_better)
    if len(best) > 1:
        line = sorted(best, key=lambda point: point.x)
        where = "pre" if larger_x_is_better else "post"
        axes.step([p.x for p in line], [p.y for p in line], where=where, color=GRID, linewidth=1.4, zorder=1)
    for number, point in enumerate(points):
        colour = SERIES[number % len(SERIES)]
        if point.spread is not None:
            axes.vlines(point.x, *point.spread, color=colour, linewidth=1.2)
        axes.scatter([point.x], [point.y], s=42, color=colour, zorder=3, label=_label(point.name))
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    figure.legend(loc="outside lower left", fontsize=8.5, labelcolor=INK, frameon=False, ncols=1)
    return as_svg(figure, name)


def pareto(points: Sequence[Point], *, larger_x_is_better: bool) -> list[Point]:
    """Those that no other point beats in one number without losing in the other; lower y is better."""

    def beats(one: Point, other: Point) -> bool:
        x, other_x = (-one.x, -other.x) if larger_x_is_better else (one.x, other.x)
        return x <= other_x and one.y <= other.y and (x, one.y) != (other_x, other.y)

    return [point for point in points if not any(beats(other, point) for other in points)]


def _histogram(axis: object, found: Distribution) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    total, bins = sum(found.counts) + found.outside, len(found.counts)
    width = (found.high - found.low) / bins
    edges = [found.low + width * number for number in range(bins + 1)]
    heights = [count / total / width for count in found.counts]
    colour, filled = (MUTED, True) if found.of == "dense" else (SERIES[0], False)
    axis.stairs(heights, edges, color=colour, fill=filled, alpha=0.35 if filled else 1.0, linewidth=1.1)


def _label(name: str) -> str:
    """matplotlib reads `$` as the beginning of a formula, and leaves out labels that begin with `_`."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _short(kind: str) -> str:
    """`model.layers.*.mlp.up_proj` → `up_proj`."""
    return kind.rpartition(".")[2]
