"""Where in a text a compressed model differs from the dense one: by position in the window, and the worst tokens."""

from __future__ import annotations

from typing import Literal

from llmcompress.records.rows import Record


class PositionRange(Record):
    """Neighbouring positions of all windows together."""

    first: int
    """Position in the window, as the number of tokens before it."""
    last: int
    tokens: int
    kl: float
    """KL(dense ‖ compressed), mean in nats."""
    dense_loss: float
    """Mean in nats."""
    compressed_loss: float


class PositionProfile(Record):
    """Whether the difference grows with the number of tokens before a prediction."""

    kind: Literal["position_profile"] = "position_profile"
    text: str
    protocol: str
    ranges: tuple[PositionRange, ...]


class WorstToken(Record):
    """A prediction that the compression changed, as text; special tokens are written out."""

    window: int
    position: int
    """As the number of tokens before it in the window."""
    kl: float
    """In nats."""
    before: str
    """The end of what the model had read."""
    actual: str
    """The token that comes."""
    after: str
    """The beginning of what follows it."""
    dense_probability: float
    """Of the actual token."""
    compressed_probability: float
    dense_top: str
    """The token that the dense model held most likely."""
    dense_top_probability: float
    compressed_top: str
    compressed_top_probability: float


class WorstTokens(Record):
    """The predictions with the largest KL, falling, at most 20."""

    kind: Literal["worst_tokens"] = "worst_tokens"
    text: str
    protocol: str
    tokens: tuple[WorstToken, ...]
