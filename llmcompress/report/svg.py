"""A matplotlib figure as inline SVG: text stays text, colours are those of the page, ids are unique."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from llmcompress.errors import CompressError, ExitCode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#010102", "#010103"
"""Stand for colours of the page, which differ in light and dark: each is replaced by a CSS variable."""

SERIES = ("#010201", "#010202", "#010203", "#010204", "#010205", "#010206")

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}


def require_plots() -> None:
    """Raises: CompressError when a library that draws or fills the report is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise CompressError(
            "report.library",
            f"a report needs {missing.name}, which is not installed",
            fix="pip install llmcompress[report]",
            exit_code=ExitCode.REFUSED,
        ) from missing


def new_figure(width: float = 4.4, height: float = 2.8, *, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure in inches with its axes, narrow enough to be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.tick_params(colors=MUTED, labelsize=9, length=3, width=0.8)
        for side, spine in one.spines.items():
            spine.set_color(GRID)
            spine.set_visible(side in ("left", "bottom"))
        one.patch.set_visible(False)
        one.set_axisbelow(True)
        one.grid(visible=True, color=GRID, linewidth=0.6)
    figure.patch.set_visible(False)
    return figure, axes if rows * columns > 1 else axes[0][0]


def as_svg(figure: Figure, name: str) -> str:
    """`name` is different for every figure of a page."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px var(--font)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
