"""Fits the linear predictors of dynamic inference on calibration text. N = tokens, D = hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.modules.linear_predictor import LinearPredictor, unit_mean_square
from llmcompress.numerics.linear_map import LinearMap

SMALLEST = 1e-6
"""Below what float32 can tell from nothing."""


class PredictorFit:
    """Ridge regression of a positive number's logarithm on the state, batch by batch."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._map = LinearMap(width, 1, device)
        self._tokens = 0
        self._sum = 0.0

    def add(self, state_ND: Tensor, value_N: Tensor) -> None:
        """More tokens, each as weighty as any other."""
        logarithm_N1 = value_N.float().clamp_min(SMALLEST).log()[:, None]
        self._map.add(unit_mean_square(state_ND), logarithm_N1, torch.ones_like(value_N, dtype=torch.float32))
        self._tokens += len(value_N)
        self._sum += float(logarithm_N1.sum())

    def solve(self, ridge: float, storage_dtype: torch.dtype) -> LinearPredictor:
        """The predictor, rounded to the stored dtype; with infinite `ridge` it predicts the mean of all tokens."""
        start_I1 = torch.zeros(len(self._map.gram_II), 1, device=self._map.gram_II.device)
        start_I1[-1] = self._sum / max(self._tokens, 1)
        map_I1 = self._map.solve(start_I1, ridge)
        return LinearPredictor(map_I1[:-1, 0].to(storage_dtype).float(), float(map_I1[-1, 0]))
