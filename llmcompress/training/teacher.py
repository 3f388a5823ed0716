"""The teacher of a distillation: a model that is loaded on first use. B, T, V as in head.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.training.data.batch import Batch
from llmcompress.training.head import Head, Predictions, find_head, predictions, rows_at_once


class Teacher(Protocol):
    """Gives target distributions: a model, or logits stored on disk."""

    def predictions(self, batch: Batch) -> Predictions:
        """For every position of the batch, without a graph; logits are computed when and where they are needed."""


class ModelTeacher:
    """A model, in its own dtype and in eval mode; with a callable in its place it is loaded at its first use."""

    def __init__(self, model: PreTrainedModel | Callable[[], PreTrainedModel], device: torch.device) -> None:
        self._given, self._device = model, device
        self._model: PreTrainedModel | None = None
        self._head: Head | None = None

    def predictions(self, batch: Batch) -> Predictions:
        """One forward pass; with a head that can be used alone, logits of a few rows at a time."""
        model = self._loaded()
        most = rows_at_once(model.config.get_text_config().vocab_size)
        with self._as_it_is():
            if batch.ids_BT.numel() > most and self._head is None:
                self._head = find_head(model, batch.ids_BT)
            found = predictions(model, batch, self._head if batch.ids_BT.numel() > most else None)

        def logits(values_RX: Tensor) -> Tensor:
            with self._as_it_is():
                return found.logits(values_RX)

        return Predictions(found.values_RX, logits)

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """Without the student's mixed precision and gradients."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            yield

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            model = self._given if isinstance(self._given, PreTrainedModel) else self._given()
            self._model = model.to(self._device).eval().requires_grad_(False)
        return self._model
