"""Means over independent units with standard errors and bootstrap intervals, for differences that are paired."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmcompress.records.tasks import Interval

RESAMPLES = 2000
SEED = 0

_PIECE = 2_000_000
"""Draws at a time, 16 MB."""


def interval(values: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """The mean, its standard error, and the 95 % percentile interval of the bootstrap over the values (0: none).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3 (percentile interval).
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean=mean, standard_error=None, count=len(array))
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    if not resamples:
        return Interval(mean=mean, standard_error=error, count=len(array))
    random, means = np.random.default_rng(SEED), []
    for start in range(0, resamples, step := max(1, _PIECE // len(array))):
        rows = min(step, resamples - start)
        means.append(array[random.integers(0, len(array), (rows, len(array)))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(mean=mean, standard_error=error, low=float(low), high=float(high), count=len(array))


def paired(dense: Sequence[float], own: Sequence[float]) -> Interval:
    """The same of own − dense, unit by unit."""
    return interval([after - before for before, after in zip(dense, own, strict=True)])
