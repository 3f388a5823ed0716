"""Ridge regression: every option of every unit adds its share to the logarithm of the loss. P, F as in base.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from llmcompress.plan_search.proxies.predictors.base import PREDICTORS, Forecast, Predictor


class Regression(Forecast):
    """A regression of scikit-learn that knows its own standard deviation."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @override
    def mean(self, features_PF: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._model.predict(features_PF)
        return found

    @override
    def spread(self, features_PF: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._model.predict(features_PF, return_std=True)[1]
        return found


@PREDICTORS.register("ridge")
class Ridge(Predictor):
    """Bayesian ridge regression: the strength of the penalty is what makes the judged plans most likely.

    Source: MacKay, Neural Computation 4 (1992), 415-447; scikit-learn's BayesianRidge.
    """

    @override
    def learned(self, features_PF: np.ndarray, targets_P: np.ndarray, *, seed: int) -> Forecast:
        from sklearn.linear_model import BayesianRidge

        return Regression(BayesianRidge().fit(features_PF, targets_P))
