"""Numbers of an evaluation, before and after with the difference: what every table, card and verdict is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from llmcompress.records.cost import Cost, Rate
from llmcompress.records.evaluation import Measured
from llmcompress.records.measurements import Divergence, PerplexityResult, WeightBytes
from llmcompress.report.forms import FORMS, signed

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
    better: Literal["lower", "higher", "neither"] = "neither"
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
        return "–" if value is None else FORMS[self.form](value)

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
    interval = interval_of(found)
    return Change(found.mean, *(interval or (None, None)), is_ratio=is_ratio)


def lines(measured: Measured) -> list[Line]:
    """All numbers, kind by kind."""
    return [line for find in LINES.values() for line in find(measured)]


def _sizes(measured: Measured) -> Iterable[Line]:
    found = {each.of: each.bytes for each in measured.of_kind(WeightBytes)}
    value = found.get("compressed", found.get("model"))
    dense = found.get("dense")
    if value is not None:
        change = Change(value / dense, is_ratio=True) if dense else None
        yield Line("weight_bytes", "weight files", "", "bytes", "lower", dense, value, change)


def _perplexities(measured: Measured) -> Iterable[Line]:
    found = measured.of_kind(PerplexityResult)
    dense = {each.conditions: each for each in found if each.of == "dense"}
    compared = {each.conditions: each for each in measured.of_kind(Divergence)}
    for each in found:
        if each.of == "dense":
            continue
        before, other = dense.get(each.conditions), compared.get(each.conditions)
        ratio = changed(other.perplexity_ratio, is_ratio=True) if other else None
        yield Line(
            "perplexity",
            "perplexity",
            each.text,
            "perplexity",
            "lower",
            before.perplexity if before else None,
            each.perplexity,
            ratio,
        )
        yield Line(
            "perplexity",
            "bits per byte",
            each.text,
            "bits",
            "lower",
            before.bits_per_byte if before else None,
            each.bits_per_byte,
            Change(each.bits_per_byte - before.bits_per_byte) if before and not ratio else None,
        )


def _divergences(measured: Measured) -> Iterable[Line]:
    for each in measured.of_kind(Divergence):
        yield _one("KL from dense, nats per token", each.text, "nats", "lower", each.kl)
        yield Line("divergence", "KL from dense, 99 % quantile", each.text, "nats", "lower", value=each.kl_99)
        yield _one("same top token", each.text, "share", "higher", each.same_top)
        yield _one("tokens right → wrong", each.text, "share", "lower", each.right_to_wrong)
        yield _one("tokens wrong → right", each.text, "share", "higher", each.wrong_to_right)


def _one(name: str, on: str, form: str, better: Literal["lower", "higher"], found: Estimated) -> Line:
    """A number that exists of the comparison alone."""
    return Line("divergence", name, on, form, better, value=found.mean, spread=interval_of(found))


def _costs(measured: Measured) -> Iterable[Line]:
    found = measured.of_kind(Cost)
    dense = {each.setting: each for each in found if each.of == "dense"}
    many = len({each.setting for each in found}) > 1
    for each in found:
        if each.of == "dense":
            continue
        on = f"batch {each.batch}, context {each.context}" if many else ""
        protocol = f"{each.device}, {each.threads} threads, {each.dtype}, batch {each.batch}, context {each.context}"
        before = dense.get(each.setting)
        told = partial(Line, "cost", on=on, protocol=protocol)
        for name in ("prefill", "decode"):
            rate: Rate = getattr(each.speed, name)
            base: Rate | None = getattr(before.speed, name) if before else None
            yield told(
                f"{name}, tokens/s",
                form="rate",
                better="higher",
                dense=base.median if base else None,
                value=rate.median,
                change=_speed_up(rate, base) if base else None,
            )
        for title, form, find in _OTHER_COSTS:
            value, base_value = find(each), find(before) if before else None
            if value is not None:
                yield told(title, form=form, better="lower", dense=base_value, value=value)


def _speed_up(rate: Rate, base: Rate) -> Change | None:
    """Turn by turn; the interval is that of all turns."""
    if len(rate.turns) != len(base.turns):
        return None
    ratio = rate.ratio(base)
    return Change(ratio.median, ratio.lowest, ratio.highest, is_ratio=True)


_OTHER_COSTS: tuple[tuple[str, str, Callable[[Cost], float | None]], ...] = (
    ("time to first token", "seconds", lambda each: each.speed.seconds_to_first_token),
    ("peak memory", "bytes", lambda each: each.memory.running),
    ("energy per new token", "joules", lambda each: each.energy.decode_joules_per_token),
)

LINES: Mapping[str, Callable[[Measured], Iterable[Line]]] = {
    "weight_bytes": _sizes,
    "perplexity": _perplexities,
    "divergence": _divergences,
    "cost": _costs,
}
"""Kind of measurement → its lines, in the order of reports. A new kind of measurement is one entry."""
