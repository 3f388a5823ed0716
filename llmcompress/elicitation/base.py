"""Steps that make training examples: small registered classes, each from rows to rows, one unit of work at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmcompress.elicitation.authors import Author, Authors
from llmcompress.errors import CompressError
from llmcompress.registry import Registry

Row = dict[str, Any]
"""An example, as JSON: `text`, or `prompt` with `response` or `chosen` and `rejected`, or `messages`."""


@dataclass(frozen=True)
class Tools:
    """What a unit of a step may use."""

    authors: Authors
    seed: int
    """Of this unit alone: what it draws does not depend on the units before it."""

    def author(self, name: str) -> Author:
        """A model that writes and reads: `original`, a Hub id or a folder."""
        return self.authors.author(name)


class DataStep(BaseModel, ABC):
    """One step of `data:` in a recipe. The fields are the options.

    A step is cut into units, each of which is saved when it is done. What a unit makes depends on the rows that the
    step was given, on those that its earlier units made, and on its own seed: so a killed chain resumes to the same
    rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def asks(self) -> tuple[str, ...]:
        """Names of the models that it needs."""
        return ()

    def check(self) -> None:
        """Check files and packages that it needs, before any work.

        Raises: CompressError where one is missing.
        """

    @abstractmethod
    def units(self, given: Sequence[Row]) -> int:
        """How many units there are at most."""

    @abstractmethod
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        """The rows that unit 0, 1, … adds to those that were made so far.

        Raises: CompressError for a row that lacks what the step reads.
        """

    def finished(self, made: Sequence[Row]) -> list[Row]:
        """The rows that the next step gets, once all units are done."""
        return list(made)


STEPS: Registry[DataStep] = Registry("step", "llmcompress.elicitation.steps")


def text_of(row: Row, column: str, *, step: str) -> str:
    """A column that must hold text.

    Raises: CompressError showing the columns there are.
    """
    value = row.get(column)
    if isinstance(value, str):
        return value
    raise CompressError(
        "data.columns",
        f"a row has no text in the column {column!r}; columns found: {', '.join(row) or 'none'}",
        where=f"data.{step}",
        fix="put a step before it that writes this column (`llmcompress schema` lists what each one reads)",
    )


def part_of(given: Sequence[Row], number: int, size: int) -> Sequence[Row]:
    """The rows of unit `number` where every unit takes `size` of them."""
    return given[number * size : (number + 1) * size]


def units_of(count: int, size: int) -> int:
    """How many units of that size `count` rows are."""
    return -(-count // size)
