"""The quality gate: limits of a recipe or a command, compared with what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, MetricSettings
from llmcompress.evaluation.settings.gate import Gate
from llmcompress.records.evaluation import Measured
from llmcompress.records.gate import GateLimit, GateResult, NotFinite
from llmcompress.records.measurements import Divergence, Measurement
from llmcompress.records.tasks import GenerationsResult, TaskComparison


class Found(NamedTuple):
    """A number that a limit is compared with."""

    value: float
    on: str


class Source(NamedTuple):
    """Where the numbers of one limit come from."""

    metrics: tuple[str, ...]
    """Any of these must be measured."""
    compares: bool
    """Whether it needs the dense model."""
    find: Callable[[Measured], list[Found]]


def _of_text(find: Callable[[Divergence], float]) -> Callable[[Measured], list[Found]]:
    return lambda measured: [Found(find(each), each.text) for each in measured.of_kind(Divergence)]


def _flips(measured: Measured) -> list[Found]:
    """Of answers; without tasks, of predicted tokens."""
    answers = [Found(each.flips, each.task) for each in measured.of_kind(TaskComparison)]
    return answers or _of_text(lambda each: each.right_to_wrong.mean + each.wrong_to_right.mean)(measured)


def _repetition(measured: Measured) -> list[Found]:
    """Of the compressed model, or the only one."""
    found = measured.of_kind(GenerationsResult)
    return [Found(each.repetition.mean, each.source) for each in found if each.of != "dense"]


SOURCES: Mapping[str, Source] = {
    "perplexity_ratio": Source(("perplexity",), True, _of_text(lambda each: each.perplexity_ratio.mean)),
    "kl_mean": Source(("perplexity",), True, _of_text(lambda each: each.kl.mean)),
    "flips": Source(("tasks", "perplexity"), True, _flips),
    "repetition": Source(("generations",), False, _repetition),
}
"""Limit → where its number comes from."""


def gate_of(settings: Iterable[MetricSettings]) -> Gate | None:
    """The gate among settings."""
    return next((each for each in settings if isinstance(each, Gate)), None)


def check_gate(settings: Sequence[MetricSettings], *, compares: bool) -> None:
    """That everything the gate limits is measured. `compares`: whether there is a dense model.

    Raises: CompressError naming the first limit that nothing could be compared with.
    """
    gate, measured = gate_of(settings), {METRIC_SETTINGS.name_of(type(each)) for each in settings}
    for name in _limits(gate) if gate else ():
        source = SOURCES[name]
        if source.compares and not compares:
            raise _refused(f"the limit {name} compares with the dense model, and none is given", "give the baseline")
        if not measured.intersection(source.metrics):
            wanted = " or ".join(f"`{each}:`" for each in source.metrics)
            raise _refused(f"nothing is measured that the limit {name} could be compared with", f"add {wanted}")


def judged(settings: Iterable[MetricSettings], measurements: Sequence[Measurement]) -> list[Measurement]:
    """The result of the gate, if there is one."""
    gate, measured = gate_of(settings), Measured(measurements=tuple(measurements))
    if gate is None:
        return []
    limits: list[GateLimit] = []
    if gate.finite:
        broken = measured.of_kind(NotFinite)
        limits.append(GateLimit(name="finite", limit=0, found=len(broken), on=_names(broken), kept=not broken))
    for name, limit in _limits(gate).items():
        found = SOURCES[name].find(measured)
        if found:  # else no finite number is there, which the gate says already
            worst = max(found)
            kept = worst.value <= limit
            limits.append(GateLimit(name=name, limit=limit, found=worst.value, on=worst.on, kept=kept))
    return [GateResult(limits=tuple(limits))]


def gate_failure(measured: Measured, *, saved: str) -> CompressError | None:
    """The error of a gate that is not kept; None: there is no gate, or it is kept."""
    broken = "; ".join(each.broken for each in measured.of_kind(GateResult) if not each.kept)
    if not broken:
        return None
    return CompressError(
        "gate.failed",
        f"the quality gate is not kept: {broken}",
        fix="use more bits, keep more weights or another preset, or raise the limit",
        saved=saved,
        exit_code=ExitCode.GATE,
    )


def _limits(gate: Gate) -> dict[str, float]:
    """The numbers that are limited."""
    given = gate.model_dump(exclude_none=True)
    return {name: given[name] for name in SOURCES if name in given}


def _names(broken: Sequence[NotFinite]) -> str:
    return ", ".join(each.metric for each in broken) or "everything measured"


def _refused(what: str, fix: str) -> CompressError:
    return CompressError("gate.not-measured", what, where="evaluate.gate", fix=fix, exit_code=ExitCode.USAGE)
