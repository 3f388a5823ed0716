"""`read`: rows of a file or a dataset as they are, or with a prompt made of their columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.calibration.sources import check_source
from llmcompress.elicitation.base import STEPS, DataStep, Row, Tools, text_of
from llmcompress.training.data.examples import Examples, read_rows

_PLACE = re.compile(r"\{(\w+)\}")


@STEPS.register("read")
class Read(DataStep):
    """Rows of a .jsonl, .json, .parquet, .csv, .txt or Hub dataset, added to those before.

    A `prompt` and a `response` may be put together from their columns; a paragraph of a template whose columns
    are all empty is left out.
    """

    source: str = Field(min_length=1)
    """A file or a Hub dataset."""
    split: str = Field(default="train", min_length=1)
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration of a Hub dataset."""
    prompt: str | None = None
    """Template of the prompt with columns in braces, `{instruction}`; None: the column `prompt`, if there is one."""
    response: str | None = None
    """The same for the response."""
    most: int | None = Field(default=None, ge=1)
    """Only the first rows."""

    @override
    def check(self) -> None:
        check_source(self.source, where="data.read.source")

    @override
    def units(self, given: Sequence[Row]) -> int:
        return 1

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        examples = Examples(source=self.source, split=self.split, config=self.config)
        rows = read_rows(examples, where="data.read.source")
        chosen = rows if self.most is None else rows.select(range(min(self.most, len(rows))))
        # a column that a row lacks is there, and holds nothing
        there = [{name: value for name, value in row.items() if value is not None} for row in chosen]
        return [*given, *map(self._row, there)]

    def _row(self, row: Row) -> Row:
        templates = {"prompt": self.prompt, "response": self.response}
        return {**row, **{name: _filled(template, row) for name, template in templates.items() if template is not None}}


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
