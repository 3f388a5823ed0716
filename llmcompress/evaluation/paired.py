"""Means over independent units with standard errors and bootstrap intervals, for differences that are paired."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcompress.evaluation.bootstrap import estimate
from llmcompress.records.estimate import Interval


def interval(values: Sequence[float]) -> Interval:
    """The mean, its standard error, and its 95 % bootstrap interval over the values."""
    found = estimate([torch.tensor([value], dtype=torch.float64) for value in values])
    return Interval(count=len(values), **found.model_dump())


def paired(dense: Sequence[float], own: Sequence[float]) -> Interval:
    """The same of own − dense, unit by unit."""
    return interval([after - before for before, after in zip(dense, own, strict=True)])
