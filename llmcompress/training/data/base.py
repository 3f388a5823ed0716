"""Training data: samples whose order is a function of the seed and the position only.

Every process asks for the same order; accelerate gives each its part of every batch. N = windows, T = tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llmcompress.training.data.batch import Sample, padded


@dataclass(frozen=True)
class BatchRange:
    """Batches `first` ≤ number < `end`, of `batch` samples each, in the order of `seed`."""

    first: int
    end: int
    batch: int
    seed: int


class TrainingData(ABC):
    """An endless sequence of samples: epoch after epoch, each in a new order."""

    longest: int | None = None
    """Tokens of the longest sample, if known."""
    predicts_all: bool = False
    """Whether every token of a sample but the first is predicted, and nothing is padded."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the samples, so that a training is not resumed with others."""

    @abstractmethod
    def loader(self, part: BatchRange) -> DataLoader[Any]:
        """These batches; earlier ones are not tokenised again."""

    @abstractmethod
    def held_out(self, share: float, seed: int) -> tuple[TrainingData, IndexedSamples | None]:
        """What to train on, and samples to validate on.

        Raises: CompressError where a part cannot be set apart.
        """


class IndexedSamples(TrainingData, Dataset[Sample]):
    """Samples that can be accessed by index."""

    def __init__(self) -> None:
        self._chosen: Tensor | None = None

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """One sample, tokenised on access."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Their number, including held-out ones."""

    def __len__(self) -> int:
        return self.count if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index if self._chosen is None else int(self._chosen[index]))

    def loader(self, part: BatchRange) -> DataLoader[Any]:
        """Batches of fresh permutations, one after the other; a batch may reach from one into the next."""
        # a generator of its own: the loader must not draw its seed from the random numbers of the training
        return DataLoader(
            self,
            batch_sampler=SampleOrder(len(self), part),
            collate_fn=padded,
            generator=torch.Generator().manual_seed(0),
        )

    def held_out(self, share: float, seed: int) -> tuple[TrainingData, IndexedSamples | None]:
        """Split at random."""
        training, validation = held_out(len(self), share=share, seed=seed)
        return self._only(training), self._only(validation) if len(validation) else None

    def _only(self, chosen: Tensor) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._chosen = chosen if self._chosen is None else self._chosen[chosen]
        return other


class Windows(IndexedSamples):
    """Equally long windows of packed text; every token but the first is predicted."""

    predicts_all = True

    def __init__(self, windows_NT: Tensor) -> None:
        super().__init__()
        assert len(windows_NT), "training needs windows"
        self._windows_NT = windows_NT
        self.longest = windows_NT.shape[1]

    @property
    def fingerprint(self) -> str:
        """Of all tokens."""
        return hashlib.sha256(self._windows_NT.cpu().contiguous().numpy().tobytes()).hexdigest()

    @property
    def count(self) -> int:
        """Windows."""
        return len(self._windows_NT)

    def sample(self, index: int) -> Sample:
        """A window."""
        return Sample(self._windows_NT[index])


class SampleOrder:
    """Which samples make which batch: a function of the seed and the number of the batch alone."""

    drop_last = False

    def __init__(self, count: int, part: BatchRange) -> None:
        self._count, self._part = count, part
        self.batch_size = part.batch

    def __len__(self) -> int:
        return self._part.end - self._part.first

    def __iter__(self) -> Iterator[list[int]]:
        known: dict[int, Tensor] = {}
        for number in range(self._part.first, self._part.end):
            positions = range(number * self._part.batch, (number + 1) * self._part.batch)
            epochs = {position // self._count for position in positions}
            known = {epoch: known[epoch] if epoch in known else self._order(epoch) for epoch in epochs}
            yield [int(known[position // self._count][position % self._count]) for position in positions]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._part.seed * 1_000_003 + epoch)
        return torch.randperm(self._count, generator=generator)


def held_out(count: int, *, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the samples for training and of those for validation, split at random."""
    kept = round(share * count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[kept:].sort().values, order[:kept].sort().values
