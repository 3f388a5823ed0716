"""Measurements of a model as records distinguished by `kind`; unknown kinds from other versions are preserved."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag

from llmcompress.records.cost import Cost, MachineLimits
from llmcompress.records.estimate import Estimate as Estimate
from llmcompress.records.gate import GateResult, NotFinite
from llmcompress.records.inside import Distribution, TokenDivergences
from llmcompress.records.rows import Record
from llmcompress.records.rows import Which as Which
from llmcompress.records.tasks import (
    GenerationComparison,
    GenerationsResult,
    RobustnessComparison,
    RobustnessResult,
    TaskComparison,
    TaskResult,
)


class PerplexityResult(Record):
    """Perplexity with everything needed to reproduce it."""

    kind: Literal["perplexity"] = "perplexity"
    of: Which = "model"
    text: str
    """Where the text came from (`builtin:evaluation`, `wikitext:test`)."""
    protocol: str = "default"
    """Which tokens are predicted from what: a published protocol (`gptq`, `llama-cpp`), and what of it was changed."""
    window: int
    """Tokens per window, the BOS included."""
    bos: bool
    """Whether every window starts with the BOS token (which is never predicted)."""
    tokens: int
    """Predicted tokens that count."""
    text_tokens: int | None = None
    """Of the whole text; None: not known, because only its beginning was read."""
    perplexity: float
    bits_per_byte: float
    word_perplexity: float | None = None
    """Per word between white space, as lm-eval reports it; None unless the whole text is predicted."""
    loss: Estimate | None = None
    """In nats per token: the logarithm of the perplexity."""
    calibration_error: Estimate | None = None
    """Expected calibration error of the most likely token, with 15 bins of equally many tokens: mean difference between
    its probability and how often it is right."""
    from_cache: bool = False
    """Whether its scores were cached by an earlier run, so that the model was not run."""

    @property
    def conditions(self) -> tuple[str, str, int, bool, int]:
        """What two results must share to be comparable."""
        return self.text, self.protocol, self.window, self.bos, self.tokens

    @property
    def byte_perplexity(self) -> float:
        """Per byte, as lm-eval reports it."""
        return float(2**self.bits_per_byte)


class Divergence(Record):
    """How the compressed model's predictions differ from the dense one's, token by token of one text.

    KL(dense ‖ compressed) is taken over the dense model's `top` most likely tokens and, as one event, all others:
    never more than over the whole vocabulary, and equal to it where `top` reaches that.
    """

    kind: Literal["divergence"] = "divergence"
    text: str
    protocol: str = "default"
    window: int
    bos: bool
    tokens: int
    top: int
    top_mass: float
    """Probability that the dense model gives those tokens, mean over the text: near 1, KL leaves little out."""
    kl: Estimate
    """In nats per token."""
    kl_median: float
    kl_90: float
    """The 90th percentile."""
    kl_99: float
    kl_999: float | None = None
    kl_intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """95 % intervals of the quantiles, by the names of their fields."""
    loss_increase: Estimate
    """In nats per token: the logarithm of the ratio of perplexities."""
    same_top: Estimate
    """Fraction of tokens with the same top prediction."""
    right_to_wrong: Estimate
    """Fraction of tokens that only the dense model predicted correctly."""
    wrong_to_right: Estimate
    """Fraction of tokens that only the compressed model predicted correctly."""
    delta_p: Estimate | None = None
    """Change of the actual token's probability."""
    delta_p_rms: Estimate | None = None
    """Root of the mean square of that change, over tokens."""
    calibration_error_change: Estimate | None = None
    """The compressed model's expected calibration error minus the dense one's."""

    @property
    def conditions(self) -> tuple[str, str, int, bool, int]:
        """As in `PerplexityResult`."""
        return self.text, self.protocol, self.window, self.bos, self.tokens

    @property
    def perplexity_ratio(self) -> Estimate:
        """Compressed ÷ dense; the error is that of a first-order expansion of exp, the interval exp of its ends."""
        increase = self.loss_increase
        ratio, error = math.exp(increase.mean), increase.standard_error
        low, high = (None if end is None else math.exp(end) for end in (increase.low, increase.high))
        return Estimate(mean=ratio, standard_error=None if error is None else ratio * error, low=low, high=high)


class HeldOutLoss(Record):
    """Loss on windows of the calibration text that no pass measured, before and after."""

    kind: Literal["held_out_loss"] = "held_out_loss"
    windows: int
    tokens: int
    """Predicted."""
    dense: float
    """In nats per token."""
    compressed: float
    """The same."""

    @property
    def ratio(self) -> float:
        """Compressed ÷ dense perplexity."""
        return math.exp(min(self.compressed - self.dense, 700.0))


class WeightBytes(Record):
    """Bytes of a model's weight files."""

    kind: Literal["weight_bytes"] = "weight_bytes"
    of: Which
    bytes: int


class StageSeconds(Record):
    """Wall seconds of one stage of the run."""

    kind: Literal["seconds"] = "seconds"
    stage: str
    seconds: float


class OtherMeasurement(Record):
    """A kind unknown to this version: read, kept and written unchanged."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str


Known = (
    PerplexityResult
    | Divergence
    | HeldOutLoss
    | WeightBytes
    | StageSeconds
    | TaskResult
    | TaskComparison
    | RobustnessResult
    | RobustnessComparison
    | GenerationsResult
    | GenerationComparison
    | GateResult
    | NotFinite
    | Distribution
    | TokenDivergences
    | Cost
    | MachineLimits
)

_KINDS = frozenset(str(each.model_fields["kind"].default) for each in get_args(Known))


def _tag(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "known" if isinstance(kind, str) and kind in _KINDS else "other"


Measurement = Annotated[
    Annotated[Annotated[Known, Field(discriminator="kind")], Tag("known")] | Annotated[OtherMeasurement, Tag("other")],
    Discriminator(_tag),
]
"""Any of them. A new kind is a class and a line in `Known`; other versions preserve unknown kinds."""
