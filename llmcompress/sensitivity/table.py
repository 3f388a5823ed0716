"""The loss of every option of every unit, measured once; all allocations read it. C = choices.

A unit is decided by itself: a linear, an input group, a block, the channels of an FFN. One of its options is chosen (a
scheme, a rank, a sparsity), or, if options are parts of the unit (its channels), any number of them is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Row:
    """One unit: what each option loses, and what it takes. D = axes."""

    unit: str
    options: tuple[str, ...]
    loss_C: Tensor
    """What the model is expected to lose, float64; all rows of a table have one unit of measure."""
    bits_C: Tensor
    """What is stored with this option, int64: bits, since codes need not fill whole bytes."""
    shape_CD: Tensor
    """Sizes of what computes with this option, int64; outputs × inputs of a linear, outputs × rank × inputs of two."""

    def __post_init__(self) -> None:
        count = len(self.options)
        assert self.loss_C.shape == self.bits_C.shape == (count,) and len(self.shape_CD) == count
        assert self.loss_C.dtype == torch.float64 and self.bits_C.dtype == self.shape_CD.dtype == torch.int64

    @classmethod
    def of(
        cls,
        unit: str,
        options: Sequence[str],
        losses: Sequence[float] | Tensor,
        bits: Sequence[int],
        shapes: Sequence[Sequence[int]],
    ) -> Row:
        """The same from plain numbers."""
        loss_C = losses.detach() if isinstance(losses, Tensor) else torch.tensor(losses, dtype=torch.float64)
        bits_C, shape_CD = torch.tensor(bits, dtype=torch.int64), torch.tensor(shapes, dtype=torch.int64)
        return cls(unit, tuple(options), loss_C.double().cpu(), bits_C, shape_CD)

    @property
    def bytes_C(self) -> Tensor:
        """Whole bytes of every option."""
        return (self.bits_C + 7) // 8

    def and_(self, other: Row) -> Row:
        """Two units that must take the same option: losses and bits add up, shapes stand side by side."""
        assert self.options == other.options
        return Row(
            self.unit,
            self.options,
            self.loss_C + other.loss_C,
            self.bits_C + other.bits_C,
            torch.cat([self.shape_CD, other.shape_CD], 1),
        )

    def rising(self) -> Row:
        """No larger option counts as worse than a smaller one: where it was measured so, that is noise."""
        smaller_CC = self.bits_C[None, :] <= self.bits_C[:, None]
        loss_C = torch.where(smaller_CC, self.loss_C[None, :], torch.inf).min(1).values
        return Row(self.unit, self.options, loss_C, self.bits_C, self.shape_CD)


@dataclass(frozen=True, eq=False)
class LossTable:
    """Rows of one measure, in model order."""

    rows: tuple[Row, ...]

    def __getitem__(self, unit: str) -> Row:
        """The row of that unit."""
        return next(row for row in self.rows if row.unit == unit)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of all units."""
        return tuple(row.unit for row in self.rows)

    def together(self, groups: Iterable[Sequence[str]]) -> LossTable:
        """One row for each group of units that must take the same option, under the name of the first."""
        known = {row.unit: row for row in self.rows}
        return LossTable(tuple(reduce(Row.and_, (known[unit] for unit in group)) for group in groups))

    def rising(self) -> LossTable:
        """No larger option counts as worse than a smaller one."""
        return LossTable(tuple(row.rising() for row in self.rows))

    def tensors(self) -> dict[str, Tensor]:
        """All numbers, as safetensors holds them; `about` says what they belong to."""
        named = ((f"{index}.{part}", row) for index, row in enumerate(self.rows) for part in ("loss", "bits", "shape"))
        return {name: _column(row, name.rpartition(".")[2]) for name, row in named}

    def about(self) -> dict[str, Any]:
        """Units and options, as JSON holds them."""
        return {"rows": [[row.unit, list(row.options)] for row in self.rows]}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> LossTable:
        """The table again, bit for bit."""
        return cls(
            tuple(
                Row(unit, tuple(options), *(tensors[f"{index}.{part}"] for part in ("loss", "bits", "shape")))
                for index, (unit, options) in enumerate(about["rows"])
            )
        )


def _column(row: Row, part: str) -> Tensor:
    return {"loss": row.loss_C, "bits": row.bits_C, "shape": row.shape_CD}[part]
