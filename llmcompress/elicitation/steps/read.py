"""`read`: rows of a file or a dataset as they are, or with a prompt made of their columns."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

from pydantic import Field
from typing_extensions import override

from llmcompress.calibration.records import BadRow
from llmcompress.calibration.sources import TextSource, check_source, rows_of_source
from llmcompress.elicitation.base import STEPS, DataStep, Row, Tools, text_of
from llmcompress.errors import CompressError

_PLACE = re.compile(r"\{(\w+)\}")


@STEPS.register("read")
class Read(DataStep):
    """Rows of a .jsonl, .json, .parquet, .csv, .txt, bundled text or Hub dataset, added to those before.

    A `prompt` and a `response` may be put together from their columns; a paragraph of a template whose columns
    are all empty is left out.
    """

    source: str = Field(min_length=1)
    """A file, `builtin:calibration`, or a Hub dataset."""
    split: str = Field(default="train", min_length=1)
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration of a Hub dataset."""
    prompt: str | None = None
    """Template of the prompt with columns in braces, `{instruction}`; None: the column `prompt`, if there is one."""
    response: str | None = None
    """The same for the response."""
    most: int | None = Field(default=None, ge=1)
    """Only the first rows; a large Hub dataset is then downloaded no further."""

    @override
    def check(self) -> None:
        check_source(self.source, where="data.read.source")

    @override
    def units(self, given: Sequence[Row]) -> int:
        return 1

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        # only a limit lets a large dataset of the Hub be read from its start instead of being downloaded
        source, limit = TextSource(self.source, self.split, self.config), None if self.most is None else sys.maxsize
        rows, name, _ = rows_of_source(source, max_characters=limit, where="data.read.source")
        return [*given, *map(self._row, (_columns(row, label, name) for label, row in islice(rows, self.most)))]

    def _row(self, row: Row) -> Row:
        templates = {"prompt": self.prompt, "response": self.response}
        return {**row, **{name: _filled(template, row) for name, template in templates.items() if template is not None}}


def _columns(row: Any, label: str, name: str) -> Row:
    """A column that a row lacks may be there, and hold nothing."""
    if isinstance(row, BadRow):
        where, fix = "data.read.source", "correct that row"
        raise CompressError("data.bad-row", f"{name}: {label}: {row}", where=where, fix=fix)
    named = {"text": row} if isinstance(row, str) else {"messages": row} if isinstance(row, list) else row
    return {column: value for column, value in named.items() if value is not None}


def _filled(template: str, row: Row) -> str:
    """Paragraph by paragraph; one whose columns are all empty is left out."""
    paragraphs = []
    for paragraph in template.split("\n\n"):
        columns = _PLACE.findall(paragraph)
        values = {column: text_of({column: "", **row}, column, step="read") for column in columns}
        if columns and not any(values.values()):
            continue
        paragraphs.append(_PLACE.sub(lambda place, values=values: values[place[1]], paragraph))  # type: ignore[misc]
    return "\n\n".join(paragraphs)
