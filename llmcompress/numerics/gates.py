"""Gates that training can close: hard concrete, a soft cut through a ranking, and their budget penalties.

U = units of one group. A gate multiplies a unit's output; 1 is open, 0 is closed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST, HIGHEST, TEMPERATURE = -0.1, 1.1, 2 / 3
"""The concrete distribution is stretched over this interval and then clipped to 0 … 1.

Source: Louizos et al., arXiv 1712.01312, section 4.
"""


def hard_concrete(openness_U: Tensor, uniform_U: Tensor) -> Tensor:
    """Random gates, exactly 0 or exactly 1 with some probability; differentiable in log α (`openness_U`).

    Source: Louizos et al., arXiv 1712.01312, eq. 10-12.
    """
    uniform_U = uniform_U.clamp(1e-6, 1 - 1e-6)
    concrete_U = torch.sigmoid((uniform_U.log() - (-uniform_U).log1p() + openness_U) / TEMPERATURE)
    return (concrete_U * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


def hard_concrete_mean(openness_U: Tensor) -> Tensor:
    """The gates to use when nothing is random any more (eq. 13 there)."""
    return (torch.sigmoid(openness_U) * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


def open_probability(openness_U: Tensor) -> Tensor:
    """How likely a gate is not 0: the expected L0 norm of a unit (eq. 12 there)."""
    return torch.sigmoid(openness_U - TEMPERATURE * math.log(-LOWEST / HIGHEST))


def cut_through_ranking(importance_U: Tensor, kept: Tensor, softness: float) -> Tensor:
    """Gates that keep a share (a scalar that may be learned) of the units: near 1 for the most important, then falling.

    Their mean is the kept fraction, except for clipped ends; `softness`: width of the slope, as a fraction of units.

    Source: Ning et al., arXiv 2004.02164 (DSA). Differs: a logistic slope over ranks, not over the scores themselves.
    """
    units = len(importance_U)
    rank_U = importance_U.argsort(descending=True, stable=True).argsort().to(kept.dtype)
    return torch.sigmoid((kept - (rank_U + 0.5) / units) / softness)


class Budget:
    """Holds shares to their targets: an augmented Lagrangian whose multipliers grow while a target is missed.

    The targets are approached over the first part of the training, so that gates are not all shut at once.

    Source: Wang et al., arXiv 1910.04732, section 3.2 (two multipliers, slowly rising target).
    """

    def __init__(self, targets: Sequence[float], *, ramp_steps: int, rate: float, quadratic: float) -> None:
        self._targets = torch.tensor(targets)
        self._ramp_steps, self._rate, self._quadratic = max(ramp_steps, 1), rate, quadratic
        self.multipliers = torch.zeros(len(targets))
        """One for each target; they are what must be kept of a training that is interrupted."""

    def penalty(self, removed: Sequence[Tensor], step: int) -> Tensor:
        """What to add to the loss of step 1, 2, …; `removed` are the shares that are gone now."""
        shares = torch.stack(list(removed))
        missing = self._targets.to(shares.device) * min(step / self._ramp_steps, 1.0) - shares
        multipliers = self.multipliers.to(shares.device)
        total = (multipliers * missing + self._quadratic / 2 * missing.square()).sum()
        self.multipliers = (multipliers + self._rate * missing.detach()).cpu()
        return total
