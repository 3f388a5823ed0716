"""The teacher of a distillation: a model that is loaded on first use. B, T, V as in head.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.batch import Batch
from llmcompress.training.features import Features, Wanted, observed
from llmcompress.training.head import Head, find_head, needs_head, predictions
from llmcompress.training.targets import TeacherRows


@dataclass(frozen=True)
class TeacherPredictions:
    """What a teacher says at every position of a batch; without a graph, unless it learns."""

    values_RX: Tensor
    """From which `rows` computes."""
    rows: Callable[[Tensor], TeacherRows]
    """Some of the values → logits in float32, or stored rows."""
    features: Features | None = None


class Teacher(Protocol):
    """Gives target distributions: a model, several of them, or what was stored of one."""

    @property
    def vocabulary(self) -> int | None:
        """Tokens that its rows are cut to, where it and the student pad one vocabulary to different sizes; None: no
        cut."""

    def predictions(self, batch: Batch, wanted: Wanted) -> TeacherPredictions:
        """For every position of the batch; logits are computed when and where they are needed."""


class ModelTeacher:
    """A model, in its own dtype and in eval mode; with a callable in its place it is loaded at its first use."""

    def __init__(
        self,
        model: PreTrainedModel | Callable[[], PreTrainedModel],
        device: torch.device,
        *,
        vocabulary: int | None = None,
    ) -> None:
        self._given, self._device, self._vocabulary = model, device, vocabulary
        self._model: PreTrainedModel | None = None
        self._head: Head | None = None
        self._sought_head = False
        self._learns = False

    @property
    def vocabulary(self) -> int | None:
        """What logits are cut to."""
        return self._vocabulary

    def predictions(self, batch: Batch, wanted: Wanted = Wanted()) -> TeacherPredictions:  # noqa: B008 (frozen)
        """One forward pass; with a head that can be used alone, logits of a few rows at a time."""
        model = self.model
        wants = needs_head(batch, model.config.get_text_config().vocab_size)
        with self._as_it_is():
            if wants and not self._sought_head:
                self._head, self._sought_head = find_head(model, batch.ids_BT), True
            with observed(model, wanted) as features:
                found = predictions(model, batch, self._head if wants else None)

        def rows(values_RX: Tensor) -> Tensor:
            with self._as_it_is():
                return found.logits(values_RX)[:, : self._vocabulary]

        return TeacherPredictions(found.values_RX, rows, features)

    @property
    def model(self) -> PreTrainedModel:
        """On the device and frozen; loaded now if it was not."""
        if self._model is None:
            model = self._given if isinstance(self._given, PreTrainedModel) else self._given()
            self._model = model.to(self._device).eval().requires_grad_(False)
        return self._model

    def learn(self) -> list[nn.Parameter]:
        """From now on its predictions keep their graph: it is trained along with the student. Its parameters."""
        self._learns = True
        return list(self.model.requires_grad_(True).parameters())

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """Without the student's mixed precision, and without gradients unless it learns."""
        graph = torch.set_grad_enabled(self._learns and torch.is_grad_enabled())
        with graph, torch.autocast(self._device.type, enabled=False):
            yield


def live(teacher: Teacher | None, what: str) -> ModelTeacher:
    """The teacher, where `what` needs a model and not only its predictions.

    Raises: CompressError for any other.
    """
    if isinstance(teacher, ModelTeacher):
        return teacher
    raise CompressError(
        "training.live-teacher",
        f"{what} needs one teacher model in memory, and the teacher is "
        + ("missing" if teacher is None else "an ensemble or stored on disk"),
        fix="use one teacher, without `stored`",
        exit_code=ExitCode.USAGE,
    )
