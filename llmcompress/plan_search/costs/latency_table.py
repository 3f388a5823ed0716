"""`LatencyTable`: measured seconds of products and blocks on one device in one runtime, as a JSON file.

A table that was measured on another device is read like any other: `scripts/measure_latency.py` makes it there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.device.speed import ClockName
from llmcompress.model.map import BlockInfo
from llmcompress.plan_search.costs.forms import Matrix
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

    def at_least(self, least: float) -> Seconds:
        """No less: a difference of what is short may come out negative."""
        return Seconds(prefill=max(self.prefill, least), decode=max(self.decode, least))


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
    bytes: int
    """That the runtime holds of it, and of an output head what a product needs besides."""

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
    bytes: int | None = None
    """Besides its linears; None: not measured."""


class Power(_Row):
    """Watts above idle, from a counter of the machine."""

    instrument: str
    prefill: float
    decode: float


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
    outside_bytes: int | None = None
    """Peak memory of a process without blocks and head, libraries included; None: not measured."""
    power: Power | None = None
    """While a small model ran; None: no counter could be read."""
    not_measured: tuple[str, ...] = ()
    """What is not in the table, and why."""
    load: float | None = None
    """Processes that wanted the processor while it was measured (the mean of a minute): above the cores that are there,
    others took part of the time."""
    checks: tuple[Check, ...] = ()

    @classmethod
    def read(cls, file: Path, *, runtime: str | None = None) -> LatencyTable:
        """The table of that runtime in a file; None: of the only one.

        Raises: CompressError for a file that does not hold it.
        """
        tables = read_tables(file)
        found = tables.get(runtime or next(iter(tables), ""))
        if found is None or (runtime is None and len(tables) > 1):
            raise CompressError(
                "search.latency.runtime",
                f"{file.name} has tables of {', '.join(tables) or 'no runtime'}, and not one of {runtime or 'them'}",
                fix="name one of its runtimes, or measure a table with `python scripts/measure_latency.py`",
                exit_code=ExitCode.USAGE,
            )
        return found

    def write(self, file: Path) -> None:
        """Alone into a file, whole or not at all."""
        write_tables(file, [self])

    def product(self, matrix: Matrix) -> Product:
        """Raises: CompressError where it was not measured."""
        found = next((row for row in self.products if row.matrix == matrix), None)
        return found or self._lacks(f"a product with a matrix of {matrix.outputs}×{matrix.inputs} as {matrix.form}")

    def head(self, matrix: Matrix) -> Product:
        """Raises: CompressError where it was not measured."""
        found = next((row for row in self.heads if row.matrix == matrix), None)
        return found or self._lacks(f"an output head of {matrix.outputs}×{matrix.inputs} as {matrix.form}")

    def rest(self, block: BlockInfo) -> BlockRest:
        """Raises: CompressError where it was not measured."""
        shapes = shapes_of(block)
        found = next((row for row in self.blocks if row.shapes == shapes), None)
        return found or self._lacks(f"a block of these sizes: {shapes}")

    def _lacks(self, what: str) -> NoReturn:
        raise CompressError(
            "search.latency.missing",
            f"the latency table of {self.runtime} on {self.device} does not have {what}",
            fix=f"measure a table of {self.runtime} for this space with scripts/measure_latency.py, on that device",
            exit_code=ExitCode.USAGE,
        )


def read_tables(file: Path) -> dict[str, LatencyTable]:
    """Runtime → its table.

    Raises: CompressError for a file that holds none.
    """
    try:
        found = _Tables.model_validate(read_json(file, code="search.latency.file"))
    except ValidationError as problem:
        first = problem.errors()[0]
        raise CompressError(
            "search.latency.file",
            f"{file.name} holds no latency tables: {first['msg']}",
            where=".".join(map(str, first["loc"])),
            fix="make one with `python scripts/measure_latency.py`",
            exit_code=ExitCode.USAGE,
        ) from problem
    return {table.runtime: table for table in found.tables}


def write_tables(file: Path, tables: Iterable[LatencyTable]) -> None:
    """Into one file, whole or not at all."""
    with replacing(file) as place:
        place.write_text(_Tables(tables=tuple(tables)).model_dump_json(indent=1) + "\n", encoding="utf-8")


class _Tables(_Row):
    """What a file holds: of one device, one table for each runtime."""

    tables: tuple[LatencyTable, ...]


def shapes_of(block: BlockInfo) -> str:
    """Its linears and their sizes: `self_attn.q_proj 576×576, …`."""
    return ", ".join(f"{site.name} {site.outputs}×{site.inputs}" for site in block.structure.sites)
