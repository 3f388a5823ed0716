"""A report as Markdown: what the page says, with tables in the place of drawings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmcompress.report.document import Cards, Code, Document, Paragraph, Passage, Plot, Table


def as_markdown(document: Document) -> str:
    """The whole text."""
    parts = [f"# {escaped(document.title)}", escaped(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [part for block in section.blocks for part in _BLOCKS[type(block)](block)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Text in one line that no Markdown reader takes for markup."""
    return re.sub(r"([\\`*_\[\]<>#|~$])", r"\\\1", " ".join(text.split()))


def _paragraph(block: Paragraph) -> Iterator[str]:
    text = escaped(block.text)
    yield f"**{text}**" if block.style == "verdict" else f"Warning: {text}" if block.style == "warning" else text


def _cards(block: Cards) -> Iterator[str]:
    """They stand in the table of all numbers."""
    yield from ()


def _table(block: Table) -> Iterator[str]:
    if not block.rows:
        return
    if block.title:
        yield f"**{escaped(block.title)}**"
    heads = [escaped(heading.removeprefix("#")) for heading in block.headings]
    rules = ["---:" if heading.startswith("#") else "---" for heading in block.headings]
    rows = [heads, rules, *([escaped(cell) for cell in row] for row in block.rows)]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plot(block: Plot) -> Iterator[str]:
    yield f"**{escaped(block.title)}**"
    if block.data is not None:
        yield from _table(block.data)


def _code(block: Code) -> Iterator[str]:
    if block.title:
        yield f"**{escaped(block.title)}**"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
    yield f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"


def _passage(block: Passage) -> Iterator[str]:
    yield f"**{escaped(block.title)}**" if block.title else ""
    yield f"> {escaped(block.before)}" if block.before else ""
    yield "\n".join(f"- {escaped(label)}: {escaped(text)}" for label, text in block.parts)
    yield escaped(block.note)


_BLOCKS: Mapping[type, Callable[[Any], Iterator[str]]] = {
    Paragraph: _paragraph,
    Cards: _cards,
    Table: _table,
    Plot: _plot,
    Code: _code,
    Passage: _passage,
}
