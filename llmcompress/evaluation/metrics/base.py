"""A metric: what it observes of a model is kept on disk, and results and comparisons are computed from that alone."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from llmcompress.evaluation.texts import EvaluationText
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, Which
from llmcompress.registry import Registry
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FACTS = "facts"


@dataclass(frozen=True)
class Subject:
    """What must be known of a model before anything is measured; its weights are not needed."""

    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None
    """None: no limit."""
    embedding_rows: int


@dataclass(frozen=True)
class Observation:
    """What a metric saw of one model."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON."""
    from_cache: bool = False
    """Whether the model was not run for it."""

    def stored(self) -> dict[str, Tensor]:
        """As tensors, for a cache."""
        text = json.dumps(self.facts, sort_keys=True).encode()
        return {**self.tensors, _FACTS: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], *, from_cache: bool) -> Self:
        """The inverse of `stored`."""
        facts = json.loads(tensors[_FACTS].numpy().tobytes())
        rest = {name: tensor for name, tensor in tensors.items() if name != _FACTS}
        return cls(rest, facts, from_cache)


class Metric(ABC):
    """One thing that is measured: a text, a task. It is the unit after which an evaluation that was killed goes on."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What progress, failures and results call it."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with everything but the model that decides what is observed."""

    @property
    def texts(self) -> tuple[EvaluationText, ...]:
        """What the calibration text is compared with: none of it should be measured."""
        return ()

    @classmethod
    @abstractmethod
    def prepare(cls, settings: Sequence[Any], subject: Subject) -> Sequence[Metric]:
        """Everything that is read, for all settings of this metric.

        Raises: CompressError for data that cannot be read or do not fit the model.
        """

    @abstractmethod
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        """Run a model. `dense`: what the dense model showed, where this one is to be compared with it.

        Raises: CompressError `numerics.not-finite`.
        """

    @abstractmethod
    def results(self, found: Observation, of: Which) -> list[Measurement]:
        """Of one model by itself."""

    @abstractmethod
    def compared(self, dense: Observation, found: Observation) -> list[Measurement]:
        """How a model differs from the dense one, item by item of the same data."""


METRICS: Registry[Metric] = Registry("metric", "llmcompress.evaluation.metrics")
"""Under the names of their settings."""
