"""Perplexity, and divergence from the dense model: both from one pass over the token scores of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from llmcompress.calibration.tokens import refuse_beyond_embedding
from llmcompress.evaluation.divergence import AgainstDense
from llmcompress.evaluation.kl_base import kl_base_path, kl_base_scores, kl_base_text
from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.moved_tokens import moved_tokens
from llmcompress.evaluation.perplexity import watched
from llmcompress.evaluation.reductions import Perplexity, feed
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import EvaluationText, evaluation_texts
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, Which
from llmcompress.runners.base import Runner
from llmcompress.storage.disk import sha256

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
    base: Path | None = None
    """A KL base file: the text, and what the dense model says of it."""

    @classmethod
    @override
    def prepare(cls, settings: Sequence[PerplexityTask], subject: Subject) -> list[PerplexityMetric]:
        bases = [kl_base_path(task.source) for task in settings]
        plain = [task for task, base in zip(settings, bases, strict=True) if base is None]
        texts = iter(evaluation_texts(plain, subject.tokenizer, subject.max_positions))
        found = []
        for task, base in zip(settings, bases, strict=True):
            rows = subject.embedding_rows
            text = next(texts) if base is None else kl_base_text(base, task, subject.tokenizer, embedding_rows=rows)
            refuse_beyond_embedding(text.windows, subject.tokenizer, rows, where=text.name)
            found.append(cls(text, task.top, subject.tokenizer, base))
        return found

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
        base = "" if self.base is None else sha256(self.base)
        tokens = hashlib.sha256(f"top {self.top} {base}".encode())
        for window_W, skipped in zip(self.text.windows, self.text.skips, strict=True):
            tokens.update(len(window_W).to_bytes(8, "little") + skipped.to_bytes(8, "little"))
            tokens.update(window_W.to(torch.int64).numpy().tobytes())
        return tokens.hexdigest()

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        """The most likely tokens are those of the dense model where there is one, so that both looked at the same."""
        reference = self._base_scores() if dense is None else self.windows(dense)
        title = f"scores on {self.name}" if dense is None else f"perplexity on {self.name}"
        windows, skipped = self.text.windows, self.text.skipped
        scored = score(runner, windows, skipped=skipped, top=self.top, reference=reference, name=self.name)
        return Observation(_joined(watched(scored, self.text, title, progress)))

    @override
    def results(self, found: Observation, of: Which) -> list[Measurement]:
        perplexity = Perplexity(self.text, of=of, from_cache=found.from_cache)
        windows, base = self.windows(found), self._base_scores() if of == "model" else None
        feed(windows, perplexity)
        if base is None:
            return [perplexity.result()]
        dense = Perplexity(self.text, of="dense", from_cache=True)
        feed(base, dense)
        own = perplexity.result().model_copy(update={"of": "compressed"})
        return [dense.result(), own, *self._compared(base, windows)]

    @override
    def compared(self, dense: Observation, found: Observation) -> list[Measurement]:
        return self._compared(self.windows(dense), self.windows(found))

    def _compared(self, dense: Sequence[WindowScores], own: Sequence[WindowScores]) -> list[Measurement]:
        compared = AgainstDense(self.text, dense)
        feed(own, compared)
        return [compared.result(), moved_tokens(self.text, dense, own, self._written)]

    def _written(self, tokens: list[int]) -> str:
        """As text, special tokens written out."""
        text: str = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def _base_scores(self) -> list[WindowScores] | None:
        return None if self.base is None else kl_base_scores(self.base, self.text, top=self.top)

    def windows(self, found: Observation) -> list[WindowScores]:
        """The scores of every window that were observed."""
        lengths = self.text.lengths
        split = {name: torch.split(found.tensors[name], lengths) for name in _TENSORS}
        return [WindowScores(index, **{name: split[name][index] for name in _TENSORS}) for index in range(len(lengths))]


def _joined(windows: Iterable[WindowScores]) -> dict[str, torch.Tensor]:
    """Every field over all windows, one after the other."""
    parts = list(windows)
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
