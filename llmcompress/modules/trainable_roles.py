"""Which tensors of a compressed module are trained: plain data for `trainable`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

Role = Literal["weights", "scales", "zero_points", "factors", "adapters", "biases"]
"""Weights that codes are rounded from (or that are no codes); scales of codes, and levels of codebooks; zero points;
factors that multiply to a matrix; low-rank branches of quantized linears; biases."""

ROLES: frozenset[Role] = frozenset(get_args(Role))


@dataclass(frozen=True)
class TrainableRoles:
    """Which tensors are trained, and their constraints.

    Scales alone (`weights` left out) are trained with codes that stay what they are; weights with scales as LSQ does,
    each weight's code being decided anew in every forward.
    """

    roles: frozenset[Role]
    keep_zeros: bool
    """Weights of codes that are exactly zero stay so. True after a sparse pass; otherwise a training at few bits would
    lose the many weights that were merely rounded to zero."""
    storage_dtype: torch.dtype
    """The checkpoint's dtype, to which trained scales are rounded."""
    matrices: Role = "weights"
    """The role of weight matrices: in a factored module, factors."""

    def with_matrices_as(self, matrices: Role) -> TrainableRoles:
        """The same for a part whose matrices have another role."""
        return replace(self, matrices=matrices)

    def __contains__(self, role: Role) -> bool:
        return role in self.roles
