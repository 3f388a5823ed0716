"""Allocates a budget of stored bits by a table of losses: one option for every unit."""

from __future__ import annotations

from collections.abc import Callable

from llmcompress.numerics.allocation import Option, allocate, spend
from llmcompress.sensitivity.table import LossTable, Row


def least_loss(table: LossTable, budget_bits: int, *, at_least: int = 0) -> dict[str, int]:
    """The least sum of losses within the budget, exactly; sums of bits below `at_least` only where none above fits.

    Raises: ValueError when not even the smallest options fit.
    """
    return _chosen(table, lambda options: allocate(options, budget_bits, at_least=at_least))


def by_slopes(table: LossTable, budget_bits: int) -> dict[str, int]:
    """The same up to one step, for units of many options; these stand in order of size.

    Raises: ValueError when not even the first options fit.
    """
    return _chosen(table, lambda options: spend(options, budget_bits))


def bits_of(table: LossTable, chosen: dict[str, int]) -> int:
    """Stored bits of all units together."""
    return sum(int(row.bits_C[chosen[row.unit]]) for row in table.rows)


def least_and_most_bits(table: LossTable) -> tuple[int, int]:
    """Stored bits with every unit's smallest option, and with its largest."""
    return sum(int(row.bits_C.min()) for row in table.rows), sum(int(row.bits_C.max()) for row in table.rows)


def _chosen(table: LossTable, choose: Callable[[list[list[Option]]], list[int]]) -> dict[str, int]:
    return dict(zip(table.units, choose([_options(row) for row in table.rows]), strict=True))


def _options(row: Row) -> list[Option]:
    return [Option(*each) for each in zip(row.bits_C.tolist(), row.loss_C.tolist(), strict=True)]
