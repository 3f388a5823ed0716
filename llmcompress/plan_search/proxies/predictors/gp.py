"""A Gaussian process on one-hot rows: sums over options, and smooth deviations from them. P, F as in base.py."""

from __future__ import annotations

import warnings

import numpy as np
from typing_extensions import override

from llmcompress.plan_search.proxies.predictors.base import PREDICTORS, Forecast, Predictor
from llmcompress.plan_search.proxies.predictors.ridge import Regression


@PREDICTORS.register("gp")
class GaussianProcess(Predictor):
    """Gaussian process with a linear and a squared-exponential kernel; on one-hot rows the latter is a function of how
    many choices differ. All sizes are those that make the judged plans most likely.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), chapters 2 and 5.
    """

    @override
    def learned(self, features_PF: np.ndarray, targets_P: np.ndarray, *, seed: int) -> Forecast:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

        kernel = (
            ConstantKernel(0.1, (1e-4, 1e3)) * DotProduct(1.0, (1e-3, 1e3))
            + ConstantKernel(0.1, (1e-4, 1e3)) * RBF(2.0, (0.3, 30.0))
            + WhiteKernel(0.05, (1e-6, 1.0))
        )
        model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a size at its bound is an answer, too
            return Regression(model.fit(features_PF, targets_P))
