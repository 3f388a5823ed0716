"""Perplexity, and divergence from the dense model: both from one pass over the token scores of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from llmcompress.calibration.tokens import refuse_beyond_embedding
from llmcompress.evaluation.divergence import AgainstDense
from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.perplexity import watched
from llmcompress.evaluation.reductions import Perplexity, feed
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import EvaluationText, evaluation_texts
from llmcompress.evaluation.worst_tokens import position_profile, worst_tokens
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, Which
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TENSORS = tuple(field.name for field in fields(WindowScores) if field.name != "window")


@METRICS.register("perplexity")
@dataclass(frozen=True)
class PerplexityMetric(Metric):
    """A text as token windows; observed are the scores of every token."""

    text: EvaluationText
    top: int
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    """Writes tokens out."""

    @classmethod
    @override
    def prepare(cls, settings: Sequence[PerplexityTask], subject: Subject) -> list[PerplexityMetric]:
        texts = evaluation_texts(settings, subject.tokenizer, subject.max_positions)
        for text in texts:
            refuse_beyond_embedding(text.windows, subject.tokenizer, subject.embedding_rows, where=text.name)
        return [cls(text, task.top, subject.tokenizer) for task, text in zip(settings, texts, strict=True)]

    @property
    @override
    def name(self) -> str:
        return self.text.name

    @property
    @override
    def texts(self) -> tuple[EvaluationText, ...]:
        return (self.text,)

    @property
    @override
    def fingerprint(self) -> str:
        """The tokens identify text, tokenizer, window, BOS and number of windows."""
        tokens = hashlib.sha256(f"top {self.top}".encode())
        for window_W, skipped in zip(self.text.windows, self.text.skips, strict=True):
            tokens.update(len(window_W).to_bytes(8, "little") + skipped.to_bytes(8, "little"))
            tokens.update(window_W.to(torch.int64).numpy().tobytes())
        return tokens.hexdigest()

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        """The most likely tokens are those of the dense model where there is one, so that both looked at the same."""
        reference = None if dense is None else self.windows(dense)
        title = f"scores on {self.name}" if dense is None else f"perplexity on {self.name}"
        windows, skipped = self.text.windows, self.text.skipped
        scored = score(runner, windows, skipped=skipped, top=self.top, reference=reference, name=self.name)
        return Observation(_joined(watched(scored, self.text, title, progress)))

    @override
    def results(self, found: Observation, of: Which) -> list[Measurement]:
        perplexity = Perplexity(self.text, of=of, from_cache=found.from_cache)
        feed(self.windows(found), perplexity)
        return [perplexity.result()]

    @override
    def compared(self, dense: Observation, found: Observation) -> list[Measurement]:
        before, after = self.windows(dense), self.windows(found)
        compared = AgainstDense(self.text, before)
        feed(after, compared)
        return [
            compared.result(),
            position_profile(self.text, before, after),
            worst_tokens(self.text, before, after, self.tokenizer),
        ]

    def windows(self, found: Observation) -> list[WindowScores]:
        """The scores of every window that were observed."""
        lengths = self.text.lengths
        split = {name: torch.split(found.tensors[name], lengths) for name in _TENSORS}
        return [WindowScores(index, **{name: split[name][index] for name in _TENSORS}) for index in range(len(lengths))]


def _joined(windows: Iterable[WindowScores]) -> dict[str, torch.Tensor]:
    """Every field over all windows, one after the other."""
    parts = list(windows)
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
