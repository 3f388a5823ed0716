"""What an evaluation of one model found, alone or beside the dense one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

from llmcompress.records.measurements import Divergence, Measurement, PerplexityResult
from llmcompress.records.rows import Record, SiteReport

VERSION: Literal[1] = 1
"""Increases when a field changes its meaning."""

T = TypeVar("T")


@dataclass(frozen=True)
class Quality:
    """The same measurement on the dense and on the compressed model."""

    dense: PerplexityResult
    compressed: PerplexityResult
    divergence: Divergence | None
    """The token-by-token comparison, if measured."""

    @property
    def ratio(self) -> float:
        """Compressed ÷ dense perplexity."""
        return self.compressed.perplexity / self.dense.perplexity

    @property
    def ratio_error(self) -> float | None:
        """Paired standard error of the ratio; None if unknown."""
        return self.divergence.perplexity_ratio.standard_error if self.divergence else None


class Measured(Record):
    """A record with a list of measurements."""

    measurements: tuple[Measurement, ...] = ()

    @property
    def quality(self) -> tuple[Quality, ...]:
        """One entry for every text on which both models were measured with the same conditions."""
        measured = self.of_kind(PerplexityResult)
        after = {each.conditions: each for each in measured if each.of == "compressed"}
        divergences = {each.conditions: each for each in self.of_kind(Divergence)}
        return tuple(
            Quality(each, after[each.conditions], divergences.get(each.conditions))
            for each in measured
            if each.of == "dense" and each.conditions in after
        )

    def of_kind(self, kind: type[T]) -> list[T]:
        """All measurements of one class, in order."""
        return [each for each in self.measurements if isinstance(each, kind)]

    def with_measurements(self, more: Iterable[Measurement]) -> Self:
        """The same with more measurements appended."""
        return self.model_copy(update={"measurements": (*self.measurements, *more)})


class Compression(Record):
    """How a model was made, as the report beside its weights says."""

    model: str
    """The dense model."""
    recipe: str | None
    """The resolved recipe, YAML; None: it is not there."""
    calibration_tokens: int
    sites: tuple[SiteReport, ...]
    refused: dict[str, str]
    """What was not compressed, and why."""
    warnings: tuple[str, ...]


class Evaluation(Measured):
    """One model, measured by one runtime; with a baseline, also what it lost against that."""

    version: Literal[1] = VERSION
    model: str
    baseline: str | None = None
    """The dense model; None: the model was measured by itself."""
    runner: str
    """The runtime that ran the model; a baseline is run by torch."""
    versions: dict[str, str]
    machine: dict[str, str]
    warnings: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    """What was asked for and not measured, because the evaluation was stopped."""
    command: str | None = None
    """What was typed."""
    compression: Compression | None = None

    @property
    def perplexities(self) -> list[PerplexityResult]:
        """Of the model itself, text by text."""
        return [each for each in self.of_kind(PerplexityResult) if each.of != "dense"]


class Comparison(Record):
    """Several models, each evaluated against the same dense one."""

    version: Literal[1] = VERSION
    base: str
    evaluations: tuple[Evaluation, ...]
    command: str | None = None
    """What was typed."""
