"""Integers as people write them: `0-3, 7`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

PATTERN = r"^\s*(\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*)?\s*$"
"""Numbers and ranges, commas between them; an empty text is no number at all."""


def written(numbers: Iterable[int]) -> str:
    """Different numbers, in order, runs of neighbours as ranges."""
    ordered = sorted(set(numbers))
    runs = (list(run) for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]))
    ends = ((run[0][1], run[-1][1]) for run in runs)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def read(text: str) -> list[int]:
    """The numbers again, in order; `text` must match `PATTERN`."""
    found: set[int] = set()
    for part in filter(None, (each.strip() for each in text.split(","))):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)
