"""Which windows make which step: a function of the seed and the step alone, so a resumed training sees the same."""

from __future__ import annotations

import torch
from torch import Tensor


class Batches:
    """Windows in the order of fresh permutations, one after the other, cut into batches."""

    def __init__(self, windows_NT: Tensor, *, batch: int, seed: int) -> None:
        assert len(windows_NT), "training needs windows"
        self._windows_NT, self._batch, self._seed = windows_NT, batch, seed

    def __getitem__(self, number: int) -> Tensor:
        """Batch `number` = 0, 1, …; a batch may reach from one pass over the data into the next."""
        positions = range(number * self._batch, (number + 1) * self._batch)
        count = len(self._windows_NT)
        epochs = {position // count for position in positions}
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return self._windows_NT[[int(orders[position // count][position % count]) for position in positions]]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._windows_NT), generator=generator)


def held_out(windows_NT: Tensor, *, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Windows for training and windows for validation, split at random."""
    count = round(share * len(windows_NT))
    order = torch.randperm(len(windows_NT), generator=torch.Generator().manual_seed(seed))
    return windows_NT[order[count:].sort().values], windows_NT[order[:count].sort().values]
