"""The least-squares linear map from one set of states to another. N = states, D = width."""

from __future__ import annotations

import torch
from torch import Tensor


class LinearMap:
    """Least squares, batch by batch: y ≈ x A + b, each state weighted by 1 / (mean square of y).

    The weight makes every state count alike, whatever its length: norms come after it anyway. `ridge` pulls A towards
    the identity and b towards 0, as a share of the mean diagonal; with few states that is all there is to know.
    """

    def __init__(self, width: int, outputs: int, device: torch.device) -> None:
        self.gram_II = torch.zeros(width + 1, width + 1, device=device)
        self.cross_IO = torch.zeros(width + 1, outputs, device=device)

    def add(self, x_ND: Tensor, y_NO: Tensor, weight_N: Tensor | None = None) -> None:
        """More pairs; by default weighted by what y measures."""
        weight_N = y_NO.square().mean(1).clamp_min(1e-30).reciprocal() if weight_N is None else weight_N
        root_N1 = weight_N.sqrt()[:, None]
        x_NI = torch.cat([x_ND, torch.ones_like(x_ND[:, :1])], 1) * root_N1
        self.gram_II.addmm_(x_NI.T, x_NI)
        self.cross_IO.addmm_(x_NI.T, y_NO * root_N1)

    def solve(self, start_IO: Tensor, ridge: float) -> Tensor:
        """(D+1)×O: the map, its last row the shift; with an endless ridge `start_IO`."""
        gram_II, cross_IO, start_IO = self.gram_II.double(), self.cross_IO.double(), start_IO.double()
        pull = ridge * gram_II.diagonal().mean()
        regular_II = gram_II + pull * torch.eye(len(gram_II), dtype=torch.float64, device=gram_II.device)
        change_IO = torch.linalg.solve(regular_II, cross_IO - gram_II @ start_IO)
        solved_IO: Tensor = start_IO + change_IO
        return solved_IO
