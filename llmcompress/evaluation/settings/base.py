"""What stands under `evaluate:` in a recipe: for every metric a list of its settings. Nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from llmcompress.registry import Registry


class LocalSource(NamedTuple):
    """A file or folder that must be there, and where it is named."""

    source: str
    where: str


class EvaluatedTokens(NamedTuple):
    """Tokens that will go through a model, for the estimate of a run's time."""

    window: int
    tokens: float | None
    """None: not known before the data are read."""


class MetricSettings(BaseModel):
    """The settings of one metric; `evaluation/metrics` has, under the same name, what measures it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    only_one: ClassVar[bool] = False
    """Whether a recipe has at most one, written without a list."""

    def sources(self) -> Iterator[LocalSource]:
        """What is read, so that a missing file is told before any work."""
        yield from ()

    def evaluated_tokens(self, max_positions: int | None) -> Iterator[EvaluatedTokens]:
        """What the dense and the compressed model will each be run on."""
        yield from ()


METRIC_SETTINGS: Registry[MetricSettings] = Registry("metric", "llmcompress.evaluation.settings")
"""Name of a metric → its settings in a recipe."""
