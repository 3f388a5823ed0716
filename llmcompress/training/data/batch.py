"""Samples and the batches they are padded into. B = samples of a batch, T = tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that has no loss; the same number as in torch and transformers."""


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each of them whether predicting it is part of the loss."""

    ids_T: Tensor
    learned_T: Tensor | None = None
    """None: all."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples."""

    ids_BT: Tensor
    targets_BT: Tensor
    """The token that each position has to predict; `IGNORED` where there is none, as at the last position."""
    attention_BT: Tensor | None = None
    """1 for tokens, 0 for padding; None where nothing is padded."""
    generated_B: Tensor | None = None
    """Which samples the student wrote itself; None: none."""

    @property
    def generated_R(self) -> Tensor:
        """The same for every position of all samples."""
        own_B = torch.zeros(len(self.ids_BT), dtype=torch.bool) if self.generated_B is None else self.generated_B
        return own_B.to(self.ids_BT.device)[:, None].expand_as(self.ids_BT).flatten()

    @cached_property
    def predicted(self) -> int:
        """Number of tokens in the mean loss."""
        return int((self.targets_BT != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        attention_BT = None if self.attention_BT is None else self.attention_BT.to(device)
        generated_B = None if self.generated_B is None else self.generated_B.to(device)
        return Batch(self.ids_BT.to(device), self.targets_BT.to(device), attention_BT, generated_B)


def padded(samples: Sequence[Sample]) -> Batch:
    """One batch, padded on the right; what stands in the padding is attended by nothing and predicts nothing."""
    longest = max(len(sample.ids_T) for sample in samples)
    ids_BT = torch.zeros(len(samples), longest, dtype=torch.long)
    targets_BT = torch.full_like(ids_BT, IGNORED)
    attention_BT = torch.zeros_like(ids_BT)
    for row, sample in enumerate(samples):
        count = len(sample.ids_T)
        ids_BT[row, :count] = sample.ids_T
        attention_BT[row, :count] = 1
        wanted_T = sample.ids_T[1:]
        if sample.learned_T is not None:
            wanted_T = wanted_T.masked_fill(~sample.learned_T[1:], IGNORED)
        targets_BT[row, : count - 1] = wanted_T
    return Batch(ids_BT, targets_BT, None if bool(attention_BT.all()) else attention_BT)
