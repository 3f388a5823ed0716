"""What steps share in which a model says how likely a text is, and rows stay or go by that."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import DataStep, Row, units_of


class Judging(DataStep):
    """A step in which a model reads."""

    by: str = Field(default="original", min_length=1)
    """Who reads: `original`, a Hub id or a folder."""
    batch: int = Field(default=8, ge=1)
    """Rows that are saved together."""

    @override
    def asks(self) -> tuple[str, ...]:
        return (self.by,)

    @override
    def units(self, given: Sequence[Row]) -> int:
        return units_of(len(given), self.batch)
