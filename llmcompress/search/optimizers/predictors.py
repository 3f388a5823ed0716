"""Predictors of the log loss from encoded plans, for optimizers that try many plans on one.

N = plans, F = features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from llmcompress.errors import CompressError, ExitCode


class Ensemble:
    """Small networks that differ in how they begin and in which plans they saw; their spread says how sure they are."""

    def __init__(self, *, members: int, hidden: Sequence[int]) -> None:
        self._count, self._hidden = members, tuple(hidden)

    def fit(self, features_NF: np.ndarray, targets_N: np.ndarray, random: np.random.Generator) -> None:
        """Anew, on all of these.

        Raises: CompressError where scikit-learn is missing.
        """
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.neural_network import MLPRegressor
        except ImportError as missing:
            raise CompressError(
                "search.sklearn-missing",
                "this optimizer needs scikit-learn, which is not installed",
                fix='pip install "llmcompress[search]"',
                exit_code=ExitCode.USAGE,
            ) from missing
        self._mean, self._scale = float(targets_N.mean()), float(targets_N.std()) or 1.0
        self._members = []
        for _ in range(self._count):
            model = MLPRegressor(
                self._hidden,
                alpha=1e-3,
                learning_rate_init=0.01,
                max_iter=150,
                tol=1e-4,
                random_state=int(random.integers(1 << 31)),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(features_NF, (targets_N - self._mean) / self._scale)
            self._members.append(model)

    def predict(self, features_NF: np.ndarray) -> np.ndarray:
        """Members × N."""
        return np.stack([model.predict(features_NF) for model in self._members]) * self._scale + self._mean
