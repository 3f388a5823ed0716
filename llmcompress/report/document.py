"""A report as data: sections of blocks, which every writer (HTML, Markdown) shows in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmcompress.report.lines import Line


@dataclass(frozen=True)
class Paragraph:
    """One or more sentences."""

    text: str
    style: Literal["plain", "verdict", "warning", "note"] = "plain"


@dataclass(frozen=True)
class Cards:
    """The most important numbers, large."""

    lines: Sequence[Line]


@dataclass(frozen=True)
class Table:
    """Headings that begin with `#` are of numbers, aligned right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing, and what it shows as a table."""

    title: str
    svg: str
    """Trusted: written by us, with every text escaped."""
    caption: str = ""
    data: Table | None = None
    """For readers without pictures; None: the caption says it."""


@dataclass(frozen=True)
class Code:
    """Text that is copied: a recipe, a command."""

    text: str
    title: str = ""
    language: str = ""
    """For colours, where they can be had."""


@dataclass(frozen=True)
class Passage:
    """Text of a model, shown as it is: a heading, the text that was read, and what was written."""

    title: str
    before: str
    parts: Sequence[tuple[str, str]]
    """Label and text."""
    note: str = ""


Block = Paragraph | Cards | Table | Plot | Code | Passage


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]
