"""Measurements that look inside: distributions of weights and activations, and the tokens where predictions moved."""

from __future__ import annotations

from typing import Literal

from llmcompress.records.rows import Record


class Distribution(Record):
    """Weights, or input activations, of the same linear in all blocks, as a histogram of equal bins."""

    kind: Literal["distribution"] = "distribution"
    of: Literal["model", "dense", "compressed"] = "model"
    what: Literal["weights", "activations"]
    sites: str
    """`model.layers.*.mlp.up_proj`."""
    low: float
    """Where the first bin begins: the dense and the compressed model have the same bins."""
    high: float
    counts: tuple[int, ...]
    outside: int
    """Values below the first bin or above the last."""
    zeros: float
    """Fraction that is exactly zero."""
    largest: float
    """The largest magnitude."""


class PositionDivergence(Record):
    """Some neighbouring positions of the windows."""

    first: int
    """Counted in predicted tokens of a window, from 0, with those that are context alone."""
    last: int
    kl: float
    """Mean, in nats per token."""


class MovedToken(Record):
    """A token that the compressed model predicts very differently."""

    before: str
    """The text before it, as the model read it."""
    actual: str
    """The token that follows in the text."""
    dense: str
    """The dense model's most likely token."""
    compressed: str
    kl: float
    dense_probability: float
    """Of the actual token."""
    compressed_probability: float
    after: str = ""
    """The beginning of what follows it."""
    dense_best_probability: float | None = None
    """Of the dense model's most likely token."""
    compressed_best_probability: float | None = None


class TokenDivergences(Record):
    """Where in the windows, and at which tokens, predictions moved most."""

    kind: Literal["token_divergences"] = "token_divergences"
    text: str
    protocol: str = "default"
    positions: tuple[PositionDivergence, ...]
    worst: tuple[MovedToken, ...]
    """Those of largest KL, falling."""
