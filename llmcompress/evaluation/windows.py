"""Where windows begin and end in a row of tokens, and from where on their predictions count."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.evaluation.settings.perplexity import PerplexityTask


@dataclass(frozen=True)
class Span:
    """A window as tokens `start` … `end - 1` of a text; with a BOS of its own that stands before them."""

    start: int
    end: int
    skipped: int
    """Predictions at the beginning that do not count: they are context of the others."""
    scored_from: int
    """The first token of the text that counts."""


def spans(count: int, task: PerplexityTask, window: int, *, own_bos: bool) -> list[Span]:
    """The windows of a text of `count` tokens, without those in which nothing counts.

    Without a BOS of its own the first token of a window is given, not predicted.
    """
    fresh = window - own_bos
    length = fresh + task.next_token
    step = min(task.stride or fresh, fresh)
    found: list[Span] = []
    start = covered = 0
    while start < count:
        end = min(start + length, count)
        if end - start < length:
            if task.last == "dropped":
                break
            if task.last == "whole":
                start = max(0, count - length)
        first = start + (not own_bos)  # the first token that is predicted
        skipped = {"all": 0, "new": max(0, covered - first), "second_half": window // 2}[task.scored]
        if first + skipped < end:
            found.append(Span(start, end, skipped, first + skipped))
        covered = end
        if end == count:
            break
        start += step
    return found
