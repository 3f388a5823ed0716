"""Rows of `datasets` as samples, tokenised one by one when a batch is made: by index, or in a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.training.data.base import BatchRange, IndexedSamples, TrainingData
from llmcompress.training.data.batch import Batch, Sample, padded
from llmcompress.training.data.encoders import Encoder

Numbered = tuple[int, Mapping[str, Any]]


class Rows(IndexedSamples):
    """A `datasets.Dataset`: any row can be reached, so a resumed training tokenises nothing twice."""

    def __init__(self, rows: Any, encoder: Encoder) -> None:
        super().__init__()
        self._rows, self._encoder = rows, encoder

    @property
    @override
    def count(self) -> int:
        return len(self._rows)

    @override
    def sample(self, index: int) -> Sample:
        return self._encoder(index, self._rows[index])

    @property
    @override
    def fingerprint(self) -> str:
        """Of the first and the last row, and of their number."""
        ends = [self._rows[index] for index in (0, len(self._rows) - 1)]
        return hashlib.sha256(repr((len(self._rows), ends, self._encoder.fingerprint)).encode()).hexdigest()


class Stream(TrainingData):
    """A `datasets.IterableDataset`: rows as they come, drawn from a buffer; those before a resumed step are skipped."""

    def __init__(self, rows: Any, encoder: Encoder, *, shuffle: int) -> None:
        self._rows, self._encoder, self._shuffle = rows, encoder, shuffle

    @property
    @override
    def fingerprint(self) -> str:
        """Of the first row: the others are not read for it."""
        first = next(guarded(self._rows), None)
        return hashlib.sha256(repr((first, self._shuffle, self._encoder.fingerprint)).encode()).hexdigest()

    @override
    def loader(self, part: BatchRange) -> DataLoader[Any]:
        return DataLoader(
            StreamBatches(self, part),
            batch_size=part.batch,
            collate_fn=self.batch,
            generator=torch.Generator().manual_seed(0),
        )

    @override
    def held_out(self, share: float, seed: int) -> tuple[TrainingData, IndexedSamples | None]:
        if share:
            raise CompressError(
                "training.validation",
                "a stream cannot be split into training and validation samples",
                where="training.validation",
                fix="set `validation: 0`, or `streaming: false`",
            )
        return self, None

    def items(self, seed: int) -> Iterator[Any]:
        """What batches are made of, without end."""
        return self.rows(seed)

    def batch(self, items: Sequence[Numbered]) -> Batch:
        """Tokenised here: each process does it for its own part of a batch alone."""
        return padded([self._encoder(number, row) for number, row in items])

    def rows(self, seed: int) -> Iterator[Numbered]:
        """Row after row, in another order each time they are through."""
        rows = self._rows.shuffle(seed=seed, buffer_size=self._shuffle)
        for epoch in count():
            rows.set_epoch(epoch)
            empty = True
            for numbered in guarded(rows):
                empty = False
                yield numbered
            if empty:
                raise CompressError("data.empty", "the stream has no rows", fix="use another source")


def guarded(rows: Any) -> Iterator[Numbered]:
    """Numbered rows, with one error for whatever breaks while they are read."""
    try:
        yield from enumerate(rows)
    except Exception as failure:  # from one of several libraries, which share no type
        what = " ".join(f"reading the stream failed: {failure.__cause__ or failure}".split())[:300]
        raise CompressError(
            "data.unreadable", what, fix="correct the file; without `streaming` the error names the line"
        ) from failure


class StreamBatches(IterableDataset[Any]):
    """The items of some batches of a stream."""

    def __init__(self, stream: Stream, part: BatchRange) -> None:
        self._stream, self._part = stream, part

    def __iter__(self) -> Iterator[Any]:
        part = self._part
        return islice(self._stream.items(part.seed), part.first * part.batch, part.end * part.batch)
