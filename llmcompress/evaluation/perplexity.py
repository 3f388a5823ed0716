"""Perplexity of a live model, by one protocol for all models: docs/decisions/0003-perplexity-protocol.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from llmcompress.calibration.tokens import max_positions, refuse_beyond_embedding
from llmcompress.evaluation.reductions import Perplexity, feed
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import EvaluationText, evaluation_text
from llmcompress.progress import Progress, Silent
from llmcompress.records.measurements import PerplexityResult
from llmcompress.runners.base import Runner
from llmcompress.runners.torch_runner import TorchRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PerplexityTask,
    *,
    device: torch.device | str | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Read the text of `task` and measure a live model on it, which stays where and as it is.

    `device` is where the model's inputs must be (None: where its embedding is).

    Raises: CompressError as `evaluation_text` and `score` do.
    """
    text = evaluation_text(task, tokenizer, max_positions(model.config))
    with TorchRunner(model, device=device) as runner:
        refuse_beyond_embedding(text.windows, tokenizer, runner.vocabulary, where=text.name)
        return measure(runner, text, batch=batch, progress=progress)


def measure(
    runner: Runner, text: EvaluationText, *, batch: int | None = None, progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity and bits per byte.

    Raises: CompressError `numerics.not-finite` naming the window, when the loss is not finite.
    """
    progress = progress or Silent()
    found = Perplexity(text)
    scores = score(runner, text.windows, skipped=text.skipped, batch=batch, name=text.name)
    feed(watched(scores, text, f"perplexity on {text.name}", progress), found)
    return found.result()


def watched(
    scores: Iterable[WindowScores], text: EvaluationText, title: str, progress: Progress
) -> Iterator[WindowScores]:
    """The same scores; people see which window is the last one done, and what is odd about the text."""
    for warning in text.warnings:
        progress.note(f"{text.name}: {warning}")
    progress.stage(title, len(text.windows))
    for scored in scores:
        yield scored
        progress.step(f"window {scored.window + 1}/{len(text.windows)}")
