"""Numbers of an evaluation, before and after with the difference: what every table, card and verdict is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from llmcompress.report.forms import FORMS, signed

Better = Literal["lower", "higher", "neither"]

Z_95 = 1.959964
"""Standard errors on each side of a mean that hold 95 % of a normal distribution."""


class Estimated(Protocol):
    """A mean with its standard error, perhaps with an interval."""

    @property
    def mean(self) -> float:
        """The estimate."""

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None if unknown."""


@dataclass(frozen=True)
class Change:
    """From the dense to the compressed model, paired where both saw the same items."""

    value: float
    low: float | None = None
    """95 % interval; None if unknown."""
    high: float | None = None
    is_ratio: bool = False
    """Compressed ÷ dense, otherwise compressed − dense."""

    @property
    def none(self) -> float:
        """The value that means that nothing changed."""
        return 1.0 if self.is_ratio else 0.0

    def text(self, form: str) -> str:
        """`×1.02 (1.01 to 1.03)`, `−1.2 % (−2.0 % to −0.4 %)`."""
        if self.is_ratio:
            written = f"×{self.value:.3g}" if self.value >= 10 else f"×{self.value:.3f}"
            return written if self.low is None else f"{written} ({self.low:.3f} to {self.high:.3f})"
        written = signed(self.value, form)
        if self.low is None or self.high is None:
            return written
        return f"{written} ({signed(self.low, form)} to {signed(self.high, form)})"


@dataclass(frozen=True)
class Line:
    """One number of a model, or of both models."""

    kind: str
    """Of the measurement it comes from."""
    name: str
    on: str = ""
    """The text, task or setting."""
    form: str = "number"
    better: Better = "neither"
    dense: float | None = None
    value: float | None = None
    """Of the compressed model, or of the only one; None where only a comparison is measured."""
    change: Change | None = None
    spread: tuple[float, float] | None = None
    """95 % interval of `value`."""
    protocol: str = ""
    """How it was measured, as far as that decides the number."""

    @property
    def key(self) -> tuple[str, str]:
        """What the lines of two evaluations have in common."""
        return self.name, self.on

    @property
    def title(self) -> str:
        """`perplexity on wikitext2:test`."""
        return f"{self.name} on {self.on}" if self.on else self.name

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval of the change is on the bad side."""
        if self.change is None or self.better == "neither":
            return False
        change = self.change
        if self.better == "lower":
            return (change.value if change.low is None else change.low) > change.none
        return (change.value if change.high is None else change.high) < change.none

    def written(self, value: float | None) -> str:
        """A value in this line's form; `–` if there is none."""
        if value is None:
            return "–"
        text = FORMS[self.form](value)
        return f"−{text[1:]}" if text.startswith("-") else text

    @property
    def change_text(self) -> str:
        """The difference; empty if there is none."""
        return "" if self.change is None else self.change.text(self.form)


def interval_of(found: Estimated) -> tuple[float, float] | None:
    """The 95 % interval: of the bootstrap where there is one, otherwise by the standard error."""
    low, high = getattr(found, "low", None), getattr(found, "high", None)
    if low is not None and high is not None:
        return float(low), float(high)
    if found.standard_error is None:
        return None
    return found.mean - Z_95 * found.standard_error, found.mean + Z_95 * found.standard_error


def changed(found: Estimated, *, is_ratio: bool = False) -> Change:
    """An estimate of a difference or ratio as a change."""
    low, high = interval_of(found) or (None, None)
    return Change(found.mean, low, high, is_ratio=is_ratio)
