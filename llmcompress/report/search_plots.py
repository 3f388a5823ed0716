"""The drawings of a report on a search: the front, what mattered, how the front grew, who judged what when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmcompress.report.svg import GRID, INK, MUTED, SERIES, as_svg, new_figure

Place = tuple[float, float]
"""Cost and loss."""


def scatter(
    others: Sequence[Place],
    front: Sequence[Place],
    uniform: Mapping[str, Place],
    selected: Place | None,
    *,
    x: str,
    name: str,
    limit: float | None = None,
) -> str:
    """All plans faint, the front joined by steps, uniform plans by name, the selected one ringed; both axes logarithmic
    where all numbers are positive."""
    figure, axes = new_figure(4.4, 3.4)
    places = [*others, *front, *uniform.values()]
    if others:
        axes.scatter(*zip(*others, strict=True), s=9, color=MUTED, alpha=0.35, linewidths=0, zorder=2, label="judged")
    line = sorted(front)
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=SERIES[0], linewidth=1.4, zorder=3)
        axes.scatter(*zip(*line, strict=True), s=22, color=SERIES[0], zorder=4, label="front")
    if uniform:
        axes.scatter(
            *zip(*uniform.values(), strict=True),
            s=34,
            marker="s",
            color=SERIES[1],
            zorder=4,
            label="uniform",
        )
        for text, (across, up) in uniform.items():
            axes.annotate(
                text.replace("$", r"\$"), (across, up), xytext=(5, 4), textcoords="offset points", fontsize=8, color=INK
            )
    if selected is not None:
        axes.scatter(
            [selected[0]], [selected[1]], s=110, facecolors="none", edgecolors=SERIES[2], linewidth=1.6, zorder=5,
            label="selected",
        )  # fmt: skip
    if limit is not None:
        axes.axvline(limit, color=GRID, linewidth=1.4, linestyle="--", zorder=1)
    if places and all(up > 0 for _, up in places):
        axes.set_yscale("log")
    axes.margins(x=0.1, y=0.12)
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel("KL from dense, nats per token", color=MUTED, fontsize=9)
    figure.legend(loc="outside lower left", fontsize=8.5, labelcolor=INK, frameon=False, ncols=2)
    return as_svg(figure, name)


def bars(found: Mapping[str, float], *, x: str, name: str) -> str:
    """One bar for each name, the longest on top."""
    figure, axes = new_figure(4.4, 0.7 + 0.2 * len(found))
    names = list(found)[::-1]
    axes.barh(range(len(names)), [found[each] for each in names], color=SERIES[0], height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    return as_svg(figure, name)


def growth(found: Sequence[tuple[int, float]], *, name: str) -> str:
    """Hypervolume after so many trials, relative to the end."""
    figure, axes = new_figure(4.4, 2.2)
    axes.step(*zip(*found, strict=True), where="post", color=SERIES[0], linewidth=1.6)
    axes.set_ylim(0, 1)
    axes.set_xlabel("trials", color=MUTED, fontsize=9)
    axes.set_ylabel("hypervolume", color=MUTED, fontsize=9)
    return as_svg(figure, name)


def timeline(found: Mapping[str, Sequence[tuple[float, float]]], *, name: str) -> str:
    """Worker → beginning and seconds of every trial that it judged."""
    figure, axes = new_figure(4.4, 0.8 + 0.3 * len(found))
    for row, spans in enumerate(found.values()):
        for number, (began, seconds) in enumerate(spans):
            axes.barh(row, seconds, left=began, color=SERIES[number % 2], height=0.6, linewidth=0)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds since the first trial", color=MUTED, fontsize=9)
    return as_svg(figure, name)
