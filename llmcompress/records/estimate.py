"""A mean over a sample, and how far it may be off."""

from __future__ import annotations

from llmcompress.records.rows import Record


class Estimate(Record):
    """A mean over tokens (or what the field's name says), and how far it may be off because the text is a sample."""

    mean: float
    standard_error: float | None
    """Standard error over windows, since tokens of one window are not independent; None with fewer than two windows."""
    low: float | None = None
    """Where its 95 % bootstrap interval over windows begins; None: not known, as with fewer than two windows."""
    high: float | None = None
    """Where it ends."""


class Interval(Estimate):
    """The same over independent units: documents, prompts, windows."""

    count: int
    """Units."""
