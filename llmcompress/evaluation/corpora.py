"""Whether a model lost much less on the first text than on another: a sign that it was calibrated on such text."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.records.measurements import Divergence, Estimate, Measurement

MUCH_MORE = 1.5
"""Increase of the loss on another text ÷ that on the first from which a warning says so."""


def corpus_warnings(measured: Sequence[Measurement]) -> tuple[str, ...]:
    """One for every text on which the loss rises much more than on the first, by intervals that do not overlap."""
    found = [each for each in measured if isinstance(each, Divergence)]
    return tuple(_warning(found[0], other) for other in found[1:] if _apart(found[0], other))


def _apart(first: Divergence, other: Divergence) -> bool:
    ours, theirs = first.loss_increase, other.loss_increase
    if first.text == other.text or ours.high is None or theirs.low is None:
        return False
    return ours.high < theirs.low and theirs.mean > MUCH_MORE * max(ours.mean, 0.0)


def _warning(first: Divergence, other: Divergence) -> str:
    return (
        f"compression costs much more on {other.text} than on {first.text}: the loss rises by "
        f"{_shown(other.loss_increase)} against {_shown(first.loss_increase)} nats per token (95 % intervals); if "
        f"{first.text} resembles the calibration text, its numbers flatter the model: judge by {other.text}"
    )


def _shown(found: Estimate) -> str:
    return f"{found.mean:.4f} ({found.low:.4f} to {found.high:.4f})"
