"""Evaluations and comparisons as tables of the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from llmcompress.cli.tables import plain_table
from llmcompress.report.comparing import comparison_table, names_of, worse_table
from llmcompress.report.kinds import lines
from llmcompress.report.sections import lines_table
from llmcompress.report.verdict import verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmcompress.records.evaluation import Comparison, Evaluation
    from llmcompress.report.document import Table


def evaluation_tables(found: Evaluation) -> list[RenderableType]:
    """The verdict, every number, warnings."""
    said = verdict(found)
    tables: list[RenderableType] = [Text(said, style="bold")] if said else []
    tables.append(as_rich(lines_table(lines(found), compares=found.baseline is not None)))
    tables += [Text(f"warning: {each}", style="yellow") for each in found.warnings]
    return tables


def comparison_tables(found: Comparison) -> list[RenderableType]:
    """A verdict for every model, every number, what got worse."""
    named = zip(names_of(found.evaluations), found.evaluations, strict=True)
    said: list[RenderableType] = [
        Text.assemble((f"{name}: ", "bold"), verdict(each) or "nothing was compared.") for name, each in named
    ]
    return [*said, as_rich(comparison_table(found)), as_rich(worse_table(found), title="what got worse")]


def as_rich(table: Table, *, title: str = "") -> RenderableType:
    """A table of a report on the terminal."""
    return plain_table(table.headings, table.rows, title=title or table.title)
