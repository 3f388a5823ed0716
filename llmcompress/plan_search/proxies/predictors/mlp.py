"""An ensemble of small neural networks; their disagreement is the spread. P, F as in base.py."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from typing_extensions import override

from llmcompress.plan_search.proxies.predictors.base import PREDICTORS, Forecast, Predictor


@dataclass(frozen=True, eq=False)
class Networks(Forecast):
    """Trained networks, and how targets were scaled for them."""

    members: Sequence[Any]
    center: float
    scale: float

    @override
    def mean(self, features_PF: np.ndarray) -> np.ndarray:
        mean: np.ndarray = self._all(features_PF).mean(0)
        return mean

    @override
    def spread(self, features_PF: np.ndarray) -> np.ndarray:
        spread: np.ndarray = self._all(features_PF).std(0, ddof=min(1, len(self.members) - 1))
        return spread

    def _all(self, features_PF: np.ndarray) -> np.ndarray:
        return self.center + self.scale * np.stack([each.predict(features_PF) for each in self.members])


@PREDICTORS.register("mlp")
class MLPEnsemble(Predictor):
    """ReLU networks that begin at different random weights, each trained on all plans.

    Source: Wang et al., arXiv 2006.08509 (APQ), section 3.2 (one-hot input, transfer); White et al., arXiv 1910.11858
    (BANANAS: an ensemble). Differs: smaller networks, trained by L-BFGS, since judged plans are some hundreds; what is
    transferred is the forecast and not its weights, which are forgotten by such a training (docs/log.md).
    """

    members: int = Field(default=5, ge=1)
    """Networks in the ensemble."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers; APQ has three of 400."""
    penalty: float = Field(default=1.0, ge=0)
    """Of the squared weights, divided by the number of plans."""
    steps: int = Field(default=200, ge=1)
    """Steps of L-BFGS at most."""

    @override
    def learned(self, features_PF: np.ndarray, targets_P: np.ndarray, *, seed: int) -> Forecast:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPRegressor

        center, scale = float(targets_P.mean()), float(targets_P.std()) or 1.0
        members = [
            MLPRegressor(
                hidden_layer_sizes=self.hidden,
                solver="lbfgs",
                alpha=self.penalty,
                max_iter=self.steps,
                random_state=(seed * 1_000_003 + index) % 2**32,
            )
            for index in range(self.members)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `steps` is the limit that was asked for
            return Networks([each.fit(features_PF, (targets_P - center) / scale) for each in members], center, scale)
