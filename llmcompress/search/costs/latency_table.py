"""`LatencyTable`: measured seconds of products and blocks on one device in one runtime, as a JSON file.

A table that was measured on another device is read like any other: `scripts/measure_latency.py` makes it there.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.device.speed import ClockName
from llmcompress.model.map import BlockInfo
from llmcompress.search.costs.forms import Matrix
from llmcompress.storage.atomic import replacing
from llmcompress.storage.json_file import read_json


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Seconds(_Row):
    """Of one prefill of `batch` × `context` tokens, and of one decode step of `batch` tokens."""

    prefill: float
    decode: float

    def plus(self, other: Seconds, weight: float = 1.0) -> Seconds:
        """The weighted sum of two."""
        return Seconds(prefill=self.prefill + weight * other.prefill, decode=self.decode + weight * other.decode)


NOTHING = Seconds(prefill=0.0, decode=0.0)


class Product(_Row):
    """A product of the inputs with one matrix."""

    outputs: int
    inputs: int
    form: str
    """`dense`, or the name of a scheme."""
    seconds: Seconds
    """Relative to the dense one where `by` is `differences`, so it may be negative."""
    spread: float
    """(Highest - lowest) ÷ median of the turns, the larger of both phases."""

    @property
    def matrix(self) -> Matrix:
        """Whose it is."""
        return Matrix(self.outputs, self.inputs, self.form)


class BlockRest(_Row):
    """What a block takes besides the products of its linears; with dense ones where `by` is `differences`."""

    shapes: str
    """Sizes of its linears, as `shapes_of` writes them: blocks of equal sizes take as long."""
    seconds: Seconds
    spread: float


class Check(_Row):
    """A whole model, summed from the table and measured from end to end."""

    model: str
    summed: Seconds
    measured: Seconds
    spread: float

    @property
    def errors(self) -> Seconds:
        """Summed ÷ measured - 1."""
        return Seconds(
            prefill=self.summed.prefill / self.measured.prefill - 1,
            decode=self.summed.decode / self.measured.decode - 1,
        )


class LatencyTable(_Row):
    """Everything that was measured on one device."""

    version: Literal[1] = 1
    runtime: str
    """As runners are called."""
    by: Literal["microbenchmarks", "differences"]
    """Products measured alone, one after the other with weights that are in no cache; or whole small models that differ
    in one kind of linear."""
    versions: dict[str, str]
    device: str
    processor: str
    threads: int
    clock: ClockName
    batch: int
    context: int
    """Tokens of a prefill; decode steps come right after it."""
    turns: int
    """Medians are of so many."""
    products: tuple[Product, ...]
    heads: tuple[Product, ...]
    """Output heads, which compute in a prefill whatever the runtime makes them: the last token, or all."""
    blocks: tuple[BlockRest, ...]
    outside: Seconds
    """Everything but blocks and head."""
    load: float | None = None
    """Processes that wanted the processor while it was measured (the mean of a minute): above the cores that are there,
    others took part of the time."""
    checks: tuple[Check, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Self:
        """The table in a file.

        Raises: CompressError where it is none.
        """
        return cls.model_validate(read_json(file))

    def write(self, file: Path) -> None:
        """Into a file, whole or not at all."""
        with replacing(file) as place:
            place.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def product(self, matrix: Matrix) -> Seconds:
        """Raises: CompressError where it was not measured."""
        if matrix not in self._products:
            raise _missing(f"a product with a matrix of {matrix.outputs}×{matrix.inputs} as {matrix.form}", self)
        return self._products[matrix]

    def head(self, matrix: Matrix) -> Seconds:
        """Raises: CompressError where it was not measured."""
        if matrix not in self._heads:
            raise _missing(f"an output head of {matrix.outputs}×{matrix.inputs} as {matrix.form}", self)
        return self._heads[matrix]

    def rest(self, block: BlockInfo) -> Seconds:
        """Raises: CompressError where it was not measured."""
        shapes = shapes_of(block)
        if shapes not in self._rests:
            raise _missing(f"a block of these sizes: {shapes}", self)
        return self._rests[shapes]

    @cached_property
    def _products(self) -> dict[Matrix, Seconds]:
        return {row.matrix: row.seconds for row in self.products}

    @cached_property
    def _heads(self) -> dict[Matrix, Seconds]:
        return {row.matrix: row.seconds for row in self.heads}

    @cached_property
    def _rests(self) -> dict[str, Seconds]:
        return {row.shapes: row.seconds for row in self.blocks}


def shapes_of(block: BlockInfo) -> str:
    """Its linears and their sizes: `self_attn.q_proj 576×576, …`."""
    return ", ".join(f"{site.name} {site.outputs}×{site.inputs}" for site in block.structure.sites)


def _missing(what: str, table: LatencyTable) -> CompressError:
    return CompressError(
        "search.latency.missing",
        f"the latency table of {table.runtime} on {table.device} does not have {what}",
        fix="measure a table for this space: `python scripts/measure_latency.py MODEL SPACE --runtime RUNTIME`",
        exit_code=ExitCode.USAGE,
    )
