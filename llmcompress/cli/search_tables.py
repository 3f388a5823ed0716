"""The front of a search as a table."""

from __future__ import annotations

from rich.table import Table

from llmcompress.records.search import SearchReport, SearchTrial
from llmcompress.report.searched import said, verdict_of, written_cost

MOST_ROWS = 12


def search_tables(found: SearchReport) -> list[Table]:
    """What was selected, the front, and the models that were made."""
    tables = [_front(found)]
    if found.made:
        tables.append(_made(found))
    return tables


def _front(found: SearchReport) -> Table:
    table = Table(title=verdict_of(found), title_justify="left", box=None, pad_edge=False)
    for heading in ("trial", "loss, nats per token", *found.axes, "", "plan"):
        table.add_column(heading, justify="left" if heading in ("", "plan") else "right")
    shown = list(found.front)[:MOST_ROWS]
    uniform = [each for each in found.trials if each.uniform and each.number in found.beside_uniform]
    for number in dict.fromkeys([*shown, *(each.number for each in uniform)]):
        table.add_row(*_row(found, found.trial(number)))
    return table


def _row(found: SearchReport, each: SearchTrial) -> list[str]:
    mark = "selected" if each.number == found.selected else "front" if each.number in found.front else ""
    costs = [written_cost(each.costs.get(axis), axis) for axis in found.axes]
    loss = "–" if each.loss is None else f"{each.loss:.4f}"
    return [str(each.number), loss, *costs, mark, said(found, each)]


def _made(found: SearchReport) -> Table:
    table = Table(title="Compressed by their recipes", title_justify="left", box=None, pad_edge=False)
    for heading in ("trial", "bytes", "perplexity", "ratio to dense", "KL", "plan", "folder"):
        table.add_column(heading, justify="left" if heading in ("plan", "folder") else "right")
    for each in found.made:
        error = "" if each.ratio_error is None else f" ± {each.ratio_error:.4f}"
        kl = "–" if each.kl is None else f"{each.kl:.4f}"
        table.add_row(
            str(each.trial),
            written_cost(float(each.bytes), "bytes"),
            f"{each.perplexity:.3f}",
            f"{each.ratio:.4f}{error}",
            kl,
            said(found, found.trial(each.trial)),
            each.folder,
        )
    return table
