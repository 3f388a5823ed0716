"""Pictures of the method pages, docs/methods/*.svg and docs/search.svg: what is lost against what is removed.

    pip install matplotlib
    python evals/method_pictures.py

Reads evals/results/*-books-llama.json (the bundled model), for search those of SmolLM2-135M-Instruct. Colours and
transparency suit light and dark pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

HERE = Path(__file__).resolve().parent
GREY = "#808891"
COLOURS = ("#2f81f7", "#e8702a", "#2da44e", "#a55ed6", "#d1434b")
TICKS = (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10)
SCALE_BITS = 16 / 32
"""A scale of 16 bits for every group of 32 weights."""

Rows = list[dict[str, Any]]


class Series(NamedTuple):
    """One line of a panel."""

    label: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    colour: int | None = None
    """None: the next one."""


class Panel(NamedTuple):
    """Lines over one axis; up is perplexity ÷ dense."""

    across: str
    series: Sequence[Series]
    most: float
    """Ratio up to which points are shown."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=HERE.parent / "docs" / "methods", show_default=True)
def main(out: Path) -> None:
    """Draw."""
    matplotlib.rcParams |= {"svg.hashsalt": "llmcompress", "svg.fonttype": "none", "text.color": GREY, "font.size": 9}
    for name, panels in PICTURES.items():
        figure = curves(panels(HERE / "results"))
        figure.savefig(out / f"{name}.svg", metadata={"Date": None}, transparent=True)
        click.echo(str(out / f"{name}.svg"))
    for path, figure in {
        out / "distillation.svg": bars(objectives(HERE / "results")),
        out.parent / "search.svg": losses(plans(HERE / "results")),
    }.items():
        figure.savefig(path, metadata={"Date": None}, transparent=True)
        click.echo(str(path))


def quantization(results: Path) -> list[Panel]:
    """Bits per weight, scales counted."""
    facts, branches = _read(results, "quantization"), _read(results, "low-rank")
    dense = facts["dense"]["perplexity"]
    found = []
    for method in ("rtn", "awq", "gptq", "awq→gptq"):
        points = [
            (int(row["scheme"][3]) + SCALE_BITS, _ratio(row, dense))
            for row in facts["rows"]
            if row["method"] == method and row["scheme"].endswith("_g32")
        ]
        two = [
            (row["mean_bits"], _ratio(row, dense))
            for row in branches["rows"]["branches"]
            if row["method"] == method and row["setting"].startswith("int2")
        ]
        found.append(Series(method, sorted(points + two)))
    caldera = [
        (row["mean_bits"], _ratio(row, dense))
        for row in branches["rows"]["branches"]
        if row["method"].startswith("caldera") and row["setting"].startswith("int2")
    ]
    found.append(Series("caldera: 2 bits, a branch of rank 16", sorted(caldera)))
    return [Panel("bits per weight (groups of 32)", found, 2.1)]


def pruning(results: Path) -> list[Panel]:
    """Zeros, and parameters that are gone."""
    sparse, dense = _read(results, "sparse"), _read(results, "sparse")["dense"]["perplexity"]
    masks = [row for row in sparse["rows"] if row["table"] in ("masks", "budgets")]
    zeros = []
    for number, method in enumerate(("magnitude", "wanda", "sparsegpt")):
        own = {row["share"]: _ratio(row, dense) for row in masks if row["method"] == method}
        zeros.append(
            Series(method, [(int(share[:2]), own[share]) for share in ("50 %", "60 %", "70 %")], colour=number)
        )
        zeros.append(Series(f"{method}, 2:4", [(50, own["2:4"])], line=False, colour=number))
    return [
        Panel("% of the weights are zero", zeros, 3),
        Panel("% of all parameters are gone", [*_removed(results)], 3.5),
    ]


def _removed(results: Path) -> list[Series]:
    depth, width, slices = (_read(results, name) for name in ("depth", "width", "slicegpt"))
    own = [row for row in depth["rows"] if row["method"] == "perplexity, greedy"]
    blocks = [_gone(row, depth["dense parameters"], depth["dense"]["perplexity"]) for row in own]
    before, dense = width["dense"]["parameters"], width["dense"]["perplexity"]
    scored = [
        _gone(row, before, dense)
        for row in width["rows"]
        if (row["variant"], row["refit"]) == ("activation", "columns")
    ]
    random = [
        _gone(row, before, dense) for row in width["rows"] if (row["variant"], row["refit"]) == ("random", "none")
    ]
    rows = slices["rows"]
    sliced = [
        _gone(row, depth["dense parameters"], slices["dense"]["perplexity"])
        for row in rows
        if row["method"] == "pca, refit, as large as shortcuts" or row["method"] == "pca, refit"
    ]
    return [
        Series("depth: blocks, one by one", blocks),
        Series("width: score `activation`, refitted", scored, line=False),
        Series("width: random units", random, line=False),
        Series("slicegpt: channels, refitted", sorted(point for point in sliced if point[0] > 0)),
    ]


def low_rank(results: Path) -> list[Panel]:
    """Parameters of the linears that are gone, and branches beside codes."""
    facts = _read(results, "low-rank")
    dense = facts["dense"]["perplexity"]
    factors = facts["rows"]["factors"]
    names = {
        "plain svd": "plain SVD",
        "asvd": "ASVD",
        "svd-llm": "svd: whitened by the inputs",
        "svd-llm, ranks by loss": "svd: whitened, ranks by the loss",
    }
    removed = [
        Series(label, [(int(row["setting"][:2]), _ratio(row, dense)) for row in factors if row["method"] == method])
        for method, label in names.items()
    ]
    two = [row for row in facts["rows"]["branches"] if row["setting"].startswith("int2")]
    branches = [
        Series(label, sorted((row["mean_bits"], _ratio(row, dense)) for row in two if row["method"].startswith(method)))
        for method, label in {
            "rtn": "rtn, and with a branch (LQER, EoRA)",
            "gptq": "gptq, and with a branch (EoRA)",
            "caldera": "caldera: codes and branch together",
        }.items()
    ]
    return [
        Panel("% of the linears' parameters removed", removed, 3.5),
        Panel("bits per weight: 2-bit codes, branch of rank 16", branches, 2.1),
    ]


def dynamic(results: Path) -> list[Panel]:
    """What is computed."""
    rows = _read(results, "dynamic")["rows"]
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    computed: dict[str, list[tuple[float, float]]] = {}
    for label, beginning in {
        "early_exit": "early_exit, ",
        "early_exit, later blocks get no jump": "early_exit without",
        "layer_skip": "layer_skip",
    }.items():
        own = [row for row in rows if row["method"].startswith(beginning)]
        computed[label] = sorted((100 * row["depth"], row["perplexity"] / dense) for row in own)
    static = [(80.0, row["perplexity"] / dense) for row in rows if row["method"] == "depth 0.2 (static)"]
    inputs = {"of FFNs": "activation_sparsity, ffn", "of all linears": "activation_sparsity, all"}
    zeros = [
        Series(f"activation_sparsity {label}", sorted((100 * row["active"], row["perplexity"] / dense) for row in own))
        for label, beginning in inputs.items()
        for own in [[row for row in rows if row["method"].startswith(beginning)]]
    ]
    return [
        Panel(
            "% of the blocks computed, per token",
            [
                *(Series(*each) for each in computed.items()),
                Series("depth: one block for all tokens", static, line=False),
            ],
            1.7,
        ),
        Panel("% of the inputs used", zeros, 1.1),
    ]


PICTURES: Mapping[str, Callable[[Path], list[Panel]]] = {
    "quantization": quantization,
    "pruning": pruning,
    "low-rank": low_rank,
    "dynamic-inference": dynamic,
}


def objectives(results: Path) -> tuple[float, list[tuple[str, float]]]:
    """KL from the teacher of the student before training, and after the same steps with each objective."""
    facts = _read(results, "distillation")
    rows = [(row["row"].replace(" (kept)", ""), row["forward_kl"]) for row in facts["rows"]]
    return facts["student"]["forward_kl"], sorted(rows, key=lambda row: row[1])


def plans(results: Path) -> list[Series]:
    """MB and KL from dense, mean of both texts, of plans that were chosen for the same bytes."""
    rows = json.loads((results / "search-SmolLM2-135M-Instruct.json").read_text(encoding="utf-8"))["rows"]
    names = {
        "one scheme for all layers": "uniform",
        "AutoScheme (auto-round)": "AutoScheme",
        "AutoQuantize (ModelOpt)": "AutoQuantize",
        "bits for every group of layers": "bits / bits / exact",
        "bits, FFN width and depth": "joint / exact",
    }
    found = []
    for label, part in names.items():
        own = [row for name, row in rows.items() if part in name and not name.endswith("evopress")]
        points = sorted((row["bytes"] / 1e6, fmean(fmean(nats) for nats in row["tested"].values())) for row in own)
        found.append(Series(label, points, line=len(points) > 1))
    return found


def losses(series: Sequence[Series]) -> pyplot.Figure:
    """One axis, loss up on a logarithmic scale."""
    figure, place = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    place.set_yscale("log")
    for number, each in enumerate(series):
        style = "o-" if each.line else "D"
        place.plot(*zip(*each.points, strict=True), style, color=COLOURS[number], label=each.label, markersize=4)
    ticks = [0.1, 0.2, 0.5, 1, 2]
    place.yaxis.set_major_locator(FixedLocator(ticks))
    place.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    _dress(place, "MB of weights")
    place.set_ylabel("KL from dense, nats per token", color=GREY)
    return figure


def curves(panels: Sequence[Panel]) -> pyplot.Figure:
    """Beside each other, with a logarithmic axis up."""
    figure, places = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for place, panel in zip(places[0], panels, strict=True):
        place.set_yscale("log")
        for number, series in enumerate(panel.series):
            shown = [point for point in series.points if point[1] <= panel.most]
            colour = COLOURS[number if series.colour is None else series.colour]
            style = "o-" if series.line else "D"
            place.plot(*zip(*shown, strict=True), style, color=colour, label=series.label, markersize=4, linewidth=1.2)
        top = max(up for series in panel.series for _, up in series.points if up <= panel.most)
        close = (1.02, 1.05) if top > 1.4 else ()
        ticks = [tick for tick in TICKS if tick <= top * 1.05 and tick not in close]
        place.yaxis.set_major_locator(FixedLocator(ticks))
        place.yaxis.set_major_formatter(FixedFormatter([f"×{tick:g}" for tick in ticks]))
        _dress(place, panel.across)
    places[0][0].set_ylabel("perplexity ÷ dense", color=GREY)
    return figure


def bars(found: tuple[float, list[tuple[str, float]]]) -> pyplot.Figure:
    """One for every objective; the line is where training began."""
    before, rows = found
    figure, place = pyplot.subplots(figsize=(7.6, 4.4), layout="constrained")
    place.barh([name for name, _ in rows][::-1], [value for _, value in rows][::-1], color=COLOURS[0], height=0.66)
    place.axvline(before, color=COLOURS[1], linewidth=1.4, label=f"before training: {before:.2f}")
    _dress(place, "forward KL from the teacher after 50 steps, nats per token (lower is better)")
    return figure


def _dress(place: pyplot.Axes, across: str) -> None:
    place.yaxis.set_minor_locator(NullLocator())
    place.yaxis.set_minor_formatter(NullFormatter())
    place.set_xlabel(across, color=GREY)
    place.tick_params(colors=GREY)
    place.grid(which="major", alpha=0.25, color=GREY)
    place.set_axisbelow(True)
    for side in place.spines.values():
        side.set_color(GREY)
    place.legend(fontsize=7.5, framealpha=0.0, labelcolor=GREY)


def _read(results: Path, name: str) -> Any:
    return json.loads((results / f"{name}-books-llama.json").read_text(encoding="utf-8"))


def _ratio(row: Mapping[str, Any], dense: float) -> float:
    """Mean over calibration draws ÷ the dense model's perplexity."""
    return fmean(row["perplexity"]) / dense


def _gone(row: Mapping[str, Any], before: int, dense: float) -> tuple[float, float]:
    """Percent of the parameters, and the ratio."""
    left = fmean(row["parameters"]) if isinstance(row["parameters"], list) else row["parameters"]
    return 100 * (1 - left / before), _ratio(row, dense)


if __name__ == "__main__":
    main()
