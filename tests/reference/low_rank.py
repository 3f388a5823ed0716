"""Low-rank approximation the way SVD-LLM writes it: factor the metric, decompose W S, undo S."""

from __future__ import annotations

import torch
from torch import Tensor


def whitened_svd(weight_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The approximation of that rank, and all singular values of W S, with S the Cholesky factor of the Gram matrix."""
    factor_II = torch.linalg.cholesky(gram_II)
    left_OK, sigma_K, right_KI = torch.linalg.svd(weight_OI @ factor_II, full_matrices=False)
    kept_OI = left_OK[:, :rank] @ torch.diag(sigma_K[:rank]) @ right_KI[:rank]
    return kept_OI @ torch.linalg.inv(factor_II), sigma_K


def least_squares(inputs_TR: Tensor, outputs_TO: Tensor) -> Tensor:
    """The O×R matrix that maps inputs to outputs with the least squared error."""
    return torch.linalg.lstsq(inputs_TR, outputs_TO).solution.T
