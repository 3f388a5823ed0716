"""What the quality gate found, and numbers that are none."""

from __future__ import annotations

from typing import Literal

from llmcompress.records.rows import Record


class GateLimit(Record):
    """One limit, and what was measured."""

    name: str
    """`perplexity_ratio`, `kl_mean`, `flips`, `repetition` or `finite`."""
    limit: float
    """At most; of `finite`: 0 numbers that are not."""
    found: float
    """The estimate itself, not an end of its interval; of several texts or tasks the worst."""
    on: str
    """The text or task it was found on."""
    kept: bool


class GateResult(Record):
    """The quality gate of a recipe or a command."""

    kind: Literal["gate"] = "gate"
    limits: tuple[GateLimit, ...]

    @property
    def kept(self) -> bool:
        """Whether every limit is kept."""
        return all(each.kept for each in self.limits)

    @property
    def broken(self) -> str:
        """Every limit that is not kept, as one text; empty if there is none."""
        return "; ".join(
            "not every number is finite"
            if each.name == "finite"
            else f"{each.name} on {each.on} is {each.found:.4g}, and at most {each.limit:g} is allowed"
            for each in self.limits
            if not each.kept
        )


class NotFinite(Record):
    """A metric for which the compressed model computed NaN or Inf; a gate with `finite` keeps that as a result."""

    kind: Literal["not_finite"] = "not_finite"
    metric: str
    """The text or task."""
    what: str
    """What was not finite, and where."""
