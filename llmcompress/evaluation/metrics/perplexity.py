"""Perplexity, and divergence from the dense model: both from one pass over the token scores of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from typing_extensions import override

from llmcompress.calibration.tokens import refuse_beyond_embedding
from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.moved_tokens import moved_tokens
from llmcompress.evaluation.perplexity import watched
from llmcompress.evaluation.reductions import AgainstDense, Perplexity, feed
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import EvaluationText, evaluation_texts
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, Which
from llmcompress.runners.base import Runner

TOP = 64
"""Likely tokens that are kept of every distribution, with 8 bytes each: 524 bytes per token of text."""

_TENSORS = tuple(field.name for field in fields(WindowScores) if field.name != "window")


@METRICS.register("perplexity")
@dataclass(frozen=True)
class PerplexityMetric(Metric):
    """A text as token windows; observed are the scores of every token."""

    text: EvaluationText
    decode: Callable[[list[int]], str]
    """Token ids → text."""

    @classmethod
    @override
    def prepare(cls, settings: Sequence[PerplexityTask], subject: Subject) -> list[PerplexityMetric]:
        texts = evaluation_texts(settings, subject.tokenizer, subject.max_positions)
        for text in texts:
            refuse_beyond_embedding(text.windows, subject.tokenizer, subject.embedding_rows, where=text.name)
        decode = cast(Callable[[list[int]], str], subject.tokenizer.decode)
        return [cls(text, decode) for text in texts]

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
        tokens = hashlib.sha256(f"top {TOP}".encode())
        for window_W in self.text.windows:
            tokens.update(len(window_W).to_bytes(8, "little") + window_W.to(torch.int64).numpy().tobytes())
        return tokens.hexdigest()

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        """The most likely tokens are those of the dense model where there is one, so that both looked at the same."""
        reference = None if dense is None else self.windows(dense)
        title = f"scores on {self.name}" if dense is None else f"perplexity on {self.name}"
        scored = score(runner, self.text.windows, top=TOP, reference=reference, name=self.name)
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
        return [compared.result(), moved_tokens(self.name, self.text.windows, before, after, self.decode)]

    def windows(self, found: Observation) -> list[WindowScores]:
        """The scores of every window that were observed."""
        lengths = [len(window) - 1 for window in self.text.windows]
        split = {name: torch.split(found.tensors[name], lengths) for name in _TENSORS}
        return [WindowScores(index, **{name: split[name][index] for name in _TENSORS}) for index in range(len(lengths))]


def _joined(windows: Iterable[WindowScores]) -> dict[str, torch.Tensor]:
    """Every field over all windows, one after the other."""
    parts = list(windows)
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
