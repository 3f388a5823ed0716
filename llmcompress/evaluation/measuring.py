"""Perplexity of an open runner on several texts, however they are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcompress.calibration.tokens import refuse_beyond_embedding
from llmcompress.evaluation.perplexity import measure
from llmcompress.evaluation.settings import PerplexityTask
from llmcompress.evaluation.texts import evaluation_texts
from llmcompress.progress import Progress
from llmcompress.records.measurements import PerplexityResult
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TaskLike = PerplexityTask | str
"""`wikitext2:test`, `builtin:evaluation`, `my.txt`, or a task with a window of its own."""


def as_tasks(given: TaskLike | Sequence[TaskLike]) -> list[PerplexityTask]:
    """One or several texts as tasks."""
    several = [given] if isinstance(given, PerplexityTask | str) else given
    return [
        PerplexityTask.model_validate(PerplexityTask.from_text(each)) if isinstance(each, str) else each
        for each in several
    ]


def perplexities(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[PerplexityTask], progress: Progress
) -> list[PerplexityResult]:
    """All texts are read before the first is measured.

    Raises: CompressError when one cannot be read or measured.
    """
    texts = evaluation_texts(tasks, tokenizer, runner.max_positions)
    for text in texts:
        refuse_beyond_embedding(text.windows, tokenizer, runner.vocabulary, where=text.name)
    return [measure(runner, text, progress=progress) for text in texts]
