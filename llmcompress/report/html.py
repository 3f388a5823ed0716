"""A report as one HTML file: no script, no request to any network, every text escaped, light and dark."""

from __future__ import annotations

from importlib import resources

from llmcompress.report.document import Document


def as_html(document: Document) -> str:
    """The whole page; drawings are inline SVG, everything else is escaped by the template engine."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    style = resources.files("llmcompress.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("llmcompress.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(document=document, style=Markup(style))
