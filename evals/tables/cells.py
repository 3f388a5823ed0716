"""What all tables have in common: cells, the line above and the line below them. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

Facts = dict[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(found: Sequence[float] | None, dense: float) -> str:
    """`mean (lowest–highest), ×ratio`; the range only where there is one."""
    if not found:
        return "–"
    between = f" ({min(found):.2f}–{max(found):.2f})" if len(found) > 1 else ""
    return f"{mean(found):.2f}{between}, ×{mean(found) / dense:.3f}"


def protocol(window: int, bos: bool) -> str:
    """How perplexity was measured."""
    return f"non-overlapping windows of {window}, {'each with' if bos else 'without'} BOS"


def environment(facts: Facts) -> str:
    """Where the numbers come from."""
    versions, machine = facts["versions"], facts["machine"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    return f"<sub>{packages}; {machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores</sub>"


def calibrated(facts: Facts) -> str:
    """What was measured, on what, calibrated how."""
    dense = facts["dense"]
    draws = max(len(row.get("perplexity") or row["ours"]) for row in facts["rows"])
    return (
        f"**{facts['model']}**: dense perplexity {dense['perplexity']:.3f} on `{dense['text']}` "
        f"({protocol(dense['window'], dense['bos'])}, {dense['tokens']:,} tokens). "
        f"Calibrated on up to {facts['samples']} × {facts['tokens']} tokens of `{facts['calibration']}`; "
        f"mean (lowest–highest) of up to {draws} calibration draws, × dense."
    )


def grid(facts: Facts, rows: Sequence[Facts], column: str, title: str, *, line: str = "method") -> str:
    """One line per method, one column per setting."""
    dense = facts["dense"]["perplexity"]
    cells = {(row[line], row[column]): row["perplexity"] for row in rows}
    columns = list(dict.fromkeys(row[column] for row in rows))
    lines = dict.fromkeys(row[line] for row in rows)
    body = [[each, *(spread(cells.get((each, where)), dense) for where in columns)] for each in lines]
    return markdown([title, *map(str, columns)], body)
