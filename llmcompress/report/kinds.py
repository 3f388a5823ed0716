"""Every kind of measurement as lines: one entry a kind in `LINES`, and all reports show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from llmcompress.records.cost import Cost, Rate
from llmcompress.records.evaluation import Measured
from llmcompress.records.measurements import Divergence, PerplexityResult, WeightBytes
from llmcompress.report.answers import generations, robustness, tasks
from llmcompress.report.lines import Better, Change, Estimated, Line, changed, interval_of


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
            protocol=_read(each),
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
            protocol=_read(each),
        )


def _divergences(measured: Measured) -> Iterable[Line]:
    for each in measured.of_kind(Divergence):
        yield _one("KL from dense, nats per token", each.text, "nats", "lower", each.kl)
        for name, value in (("median", each.kl_median), ("90 % quantile", each.kl_90), ("99 % quantile", each.kl_99)):
            yield Line("divergence", f"KL from dense, {name}", each.text, "nats", "lower", value=value)
        if each.delta_p_rms is not None:
            yield _one("RMS of Δp", each.text, "share", "lower", each.delta_p_rms)
        yield _one("same top token", each.text, "share", "higher", each.same_top)
        yield _one("tokens right → wrong", each.text, "share", "lower", each.right_to_wrong)
        yield _one("tokens wrong → right", each.text, "share", "higher", each.wrong_to_right)


def _one(name: str, on: str, form: str, better: Better, found: Estimated) -> Line:
    """A number that exists of the comparison alone."""
    return Line("divergence", name, on, form, better, value=found.mean, spread=interval_of(found))


def _read(found: PerplexityResult) -> str:
    """How the text was read."""
    named = "" if found.protocol == "default" else f"{found.protocol}, "
    return f"{named}window {found.window}, {'' if found.bos else 'no '}BOS, {found.tokens:,} tokens"


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
    "task": tasks,
    "robustness": robustness,
    "generations": generations,
    "cost": _costs,
}
"""Kind of measurement → its lines, in the order of reports. A new kind of measurement is one entry."""
