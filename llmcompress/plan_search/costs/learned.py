"""A learned latency predictor: corrects a table by whole plans that were measured, where its sums fail.

What runs together disturbs each other: caches, threads, memory bandwidth. So every kind of part gets one factor
(products of each form, blocks, heads, the rest), fitted to the measured plans by ridge regression towards 1. There are
few factors and most plans have most of them, so that a dozen plans are enough, and the result is a table again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmcompress.plan_search.costs.forms import Forms
from llmcompress.plan_search.costs.latency_table import Check, LatencyTable, Seconds
from llmcompress.plan_search.costs.seconds import seconds_of
from llmcompress.plan_search.plan_space import Plan, PlanSpace

Phase = Literal["prefill", "decode"]
_PHASES: tuple[Phase, ...] = ("prefill", "decode")
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried, relative to the mean square of the sums; the one with the least error on plans left out is taken."""
_REST, _BLOCKS, _HEADS = "rest", "blocks", "heads"


@dataclass(frozen=True)
class Learned:
    """The corrected table, and how far from what was measured its sums are on plans that were left out."""

    table: LatencyTable
    factors: Mapping[Phase, Mapping[str, float]]
    """Kind of part → what its seconds are multiplied by."""
    error_before: Mapping[Phase, float]
    """Mean of |summed ÷ measured - 1|."""
    error_left_out: Mapping[Phase, float]
    """The same after the correction, each plan predicted from the others."""


def corrected(
    space: PlanSpace,
    table: LatencyTable,
    plans: Sequence[Plan],
    checks: Sequence[Check],
    *,
    forms: Forms | None = None,
) -> Learned:
    """Fit the factors to measured plans: `checks` are what `check_sums` found of `plans`."""
    assert len(plans) == len(checks) >= 2, "two plans at least: each is predicted from the others"
    forms = forms or Forms(space)
    kinds = [_REST, _BLOCKS, _HEADS, *dict.fromkeys(row.form for row in table.products)]
    factors: dict[Phase, dict[str, float]] = {}
    before: dict[Phase, float] = {}
    left_out: dict[Phase, float] = {}
    shares = {kind: seconds_of(space, _only(table, kind), forms=forms) for kind in kinds}
    for phase in _PHASES:
        tokens = table.batch * (table.context if phase == "prefill" else 1)
        parts_PK = np.array([[tokens * shares[kind][phase].total(space, plan) for kind in kinds] for plan in plans])
        seconds_P = np.array([getattr(check.measured, phase) for check in checks])
        # errors count relative to the plan they are of
        parts_PK, ones_P = parts_PK / seconds_P[:, None], np.ones(len(plans))
        errors = {ridge: _left_out(parts_PK, ones_P, ridge) for ridge in _RIDGES}
        ridge = min(_RIDGES, key=lambda each: errors[each])
        factors[phase] = dict(zip(kinds, _fit(parts_PK, ones_P, ridge).tolist(), strict=True))
        before[phase] = float(np.abs(parts_PK.sum(1) - 1).mean())
        left_out[phase] = errors[ridge]
    return Learned(_scaled(table, factors), factors, before, left_out)


def _fit(parts_PK: np.ndarray, target_P: np.ndarray, ridge: float) -> np.ndarray:
    """Factors near 1 of the least squared error, all positive."""
    missing_P = target_P - parts_PK.sum(1)
    strength = ridge * float((parts_PK**2).sum(1).mean())
    gram_KK = parts_PK.T @ parts_PK / len(parts_PK) + strength * np.eye(parts_PK.shape[1])
    change_K = np.linalg.solve(gram_KK, parts_PK.T @ missing_P / len(parts_PK))
    return np.asarray(np.maximum(1 + change_K, 0.0))


def _left_out(parts_PK: np.ndarray, target_P: np.ndarray, ridge: float) -> float:
    errors = []
    for left in range(len(target_P)):
        rest = np.arange(len(target_P)) != left
        factor_K = _fit(parts_PK[rest], target_P[rest], ridge)
        errors.append(abs(float(parts_PK[left] @ factor_K) - target_P[left]))
    return float(np.mean(errors))


def _only(table: LatencyTable, kind: str) -> LatencyTable:
    """The table with zeros for everything else."""
    wanted = {phase: {kind: 1.0} for phase in _PHASES}
    return _scaled(table, wanted, otherwise=0.0)


def _scaled(
    table: LatencyTable, factors: Mapping[Phase, Mapping[str, float]], *, otherwise: float = 1.0
) -> LatencyTable:
    def times(seconds: Seconds, kind: str) -> Seconds:
        return Seconds(**{phase: getattr(seconds, phase) * factors[phase].get(kind, otherwise) for phase in _PHASES})

    return table.model_copy(
        update={
            "products": tuple(
                row.model_copy(update={"seconds": times(row.seconds, row.form)}) for row in table.products
            ),
            "heads": tuple(row.model_copy(update={"seconds": times(row.seconds, _HEADS)}) for row in table.heads),
            "blocks": tuple(row.model_copy(update={"seconds": times(row.seconds, _BLOCKS)}) for row in table.blocks),
            "outside": times(table.outside, _REST),
        }
    )
