"""A teacher that reads what is stored of it. R = rows (positions of a batch), K = tokens kept for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.base import IndexedSamples
from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.features import Wanted
from llmcompress.training.targets import SampledTokens, StoredRows, TopTokens
from llmcompress.training.teacher import Teacher, TeacherPredictions
from llmcompress.training.teacher_store import TeacherStore, sample_keys


@dataclass(frozen=True)
class _Place:
    """Where the rows of one sample stand, counted through all shards."""

    first: int
    count: int


class StoredTeacher:
    """Distributions from disk, for the samples they were computed on, in any order and any batch."""

    def __init__(self, store: TeacherStore, shards: Sequence[dict[str, Tensor]]) -> None:
        self._store, self._shards = store, shards
        self._starts = [0, *accumulate(len(shard["ids"]) for shard in shards)]
        self._places: dict[bytes, _Place] = {}
        for start, shard in zip(self._starts, shards, strict=False):
            for key, count in zip(shard["samples"], shard["rows"].tolist(), strict=True):
                self._places[bytes(key.tolist())] = _Place(start, count)
                start += count

    @property
    def vocabulary(self) -> int | None:
        """What the student's logits are cut to."""
        return self._store.vocabulary

    def predictions(self, batch: Batch, wanted: Wanted) -> TeacherPredictions:
        """Row numbers; rows are read when they are asked for.

        Raises: CompressError for a sample that is not stored.
        """
        device = batch.ids_BT.device
        numbers_BT = torch.zeros_like(batch.targets_BT, device="cpu")  # ignored positions: any row will do
        counts_BT = (batch.targets_BT != IGNORED).cpu()
        for row, key in enumerate(sample_keys(batch)):
            place = self._places.get(key)
            if place is None:
                raise CompressError(
                    "training.not-stored",
                    f"the teacher's distributions of a sample are not in {self._store.folder}",
                    fix="a stored teacher knows given text only: remove `on_policy`, or `stored`",
                    exit_code=ExitCode.USAGE,
                )
            numbers_BT[row, counts_BT[row]] = torch.arange(place.first, place.first + place.count)
        return TeacherPredictions(numbers_BT.flatten()[:, None].to(device), self._rows)

    def _rows(self, numbers_R1: Tensor) -> StoredRows:
        device, numbers_R = numbers_R1.device, numbers_R1[:, 0].cpu()
        ids_RK = self._read("ids", numbers_R).long() & (0xFFFF if self._shards[0]["ids"].dtype == torch.int16 else -1)
        log_probs_RK = self._read("log_probs", numbers_R).float()
        temperature = self._store.temperature
        if self._store.settings.form == "sampled":
            return SampledTokens(ids_RK.to(device), log_probs_RK.to(device), temperature)
        tail_R = self._read("tail", numbers_R)
        return TopTokens(ids_RK.to(device), log_probs_RK.to(device), temperature, tail_R.to(device))

    def _read(self, name: str, numbers_R: Tensor) -> Tensor:
        first = self._shards[0][name]
        found = first.new_empty(len(numbers_R), *first.shape[1:])
        for shard, start, end in zip(self._shards, self._starts, self._starts[1:], strict=False):
            here_R = (numbers_R >= start) & (numbers_R < end)
            if bool(here_R.any()):
                found[here_R] = shard[name][numbers_R[here_R] - start]
        return found


def stored(store: TeacherStore, teacher: Teacher, data: IndexedSamples) -> StoredTeacher:
    """The stored teacher, after what is missing was computed.

    Raises: CompressError as `TeacherStore.fill`.
    """
    return StoredTeacher(store, store.fill(teacher, data))
