"""The flow of an evaluation: every metric is prepared before any work, observed on each model, kept, and compared.

What was observed is kept by the hash of model and metric. So nothing is computed twice, and an evaluation that was
killed, or failed at its third task, goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, MetricSettings
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.progress import Progress
from llmcompress.records.gate import NotFinite
from llmcompress.records.measurements import Measurement, Which
from llmcompress.runners.base import Runner
from llmcompress.storage.cache import TensorCache

PROTOCOL = 3
"""Increases when observations change their meaning, which invalidates earlier caches."""

TaskLike = MetricSettings | str
"""`wikitext2:test`, `builtin:evaluation`, `my.txt`: a text; or the settings of any metric."""


@dataclass(frozen=True)
class Observed:
    """What a metric saw of a model, and the key under which it is kept."""

    metric: Metric
    found: Observation
    key: str
    not_finite: str | None = None
    """What NaN or Inf the model computed, where that is a result; nothing else was found then."""


def as_tasks(given: TaskLike | Sequence[TaskLike]) -> list[MetricSettings]:
    """One or several texts or settings as settings.

    Raises: CompressError for what is neither.
    """
    several = [given] if isinstance(given, MetricSettings | str | Mapping) else list(given)
    for each in several:
        if not isinstance(each, MetricSettings | str):
            raise CompressError(
                "evaluate.task",
                f"a {type(each).__name__} is no text and no settings",
                where="tasks",
                fix='give a text such as "wikitext2:test", settings such as PerplexityTask(source="my.txt"), '
                'or load_suite("quick")',
                exit_code=ExitCode.USAGE,
            )
    return [
        PerplexityTask.model_validate(PerplexityTask.from_text(each)) if isinstance(each, str) else each
        for each in several
    ]


def prepared(settings: Iterable[MetricSettings], subject: Subject) -> tuple[Metric, ...]:
    """The metrics of all settings, in the order in which their kinds are first named; a gate is none.

    Raises: CompressError for data that cannot be read, or do not fit the model.
    """
    kinds: dict[str, list[MetricSettings]] = {}
    for each in settings:
        kinds.setdefault(METRIC_SETTINGS.name_of(type(each)), []).append(each)
    return tuple(
        metric for name, its in kinds.items() if name in METRICS for metric in METRICS[name].prepare(its, subject)
    )


def observe(
    metrics: Iterable[Metric],
    open_runner: Callable[[], Runner],
    *,
    model: Mapping[str, str] | None,
    cache: TensorCache,
    progress: Progress,
    dense: Sequence[Observed] | None = None,
    keep_not_finite: bool = False,
) -> Iterator[Observed]:
    """What every metric sees of a model, one after the other; if all of it is in the cache, no runner is opened.

    `model` is whatever decides its numbers: hashes of weights and config, dtype, versions, kind of device; None: it is
    measured once and not kept. `dense`: the same metrics observed on the dense model, to compare with.
    `keep_not_finite`: NaN and Inf are a result, not an error.

    Raises: CompressError as the metric does, with what is kept.
    """
    with ExitStack() as opened:
        runner: Runner | None = None
        for index, metric in enumerate(metrics):
            other = None if dense is None else dense[index]
            key = _key(metric, model or {}, other)
            kept = cache.get(key) if model is not None else None
            if kept is not None:
                whose = "model" if dense is not None else "dense model"
                progress.note(f"{metric.name}: using cached scores of the {whose}")
                yield Observed(metric, Observation.from_stored(kept, from_cache=True), key)
                continue
            runner = runner or opened.enter_context(open_runner())
            try:
                fresh = _observed(metric, runner, progress, other, kept=index if model is not None else 0)
            except CompressError as problem:
                if not (keep_not_finite and problem.code == "numerics.not-finite"):
                    raise
                yield Observed(metric, Observation(), key, not_finite=f"{problem.what} ({problem.where})")
                continue
            # mapped from the file they take no memory while the model is compressed
            mapped = cache.get(key) if model is not None and cache.put(key, fresh.stored()) else None
            seen = fresh if mapped is None else Observation.from_stored(mapped, from_cache=False)
            yield Observed(metric, seen, key)


def results(observed: Iterable[Observed], of: Which) -> list[Measurement]:
    """What the metrics say of one model."""
    found: list[Measurement] = []
    for each in observed:
        if each.not_finite is not None:
            found.append(NotFinite(metric=each.metric.name, what=each.not_finite))
        else:
            found += each.metric.results(each.found, of)
    return found


def comparisons(dense: Iterable[Observed], observed: Iterable[Observed]) -> list[Measurement]:
    """What they say of its differences from the dense one, as far as both were observed."""
    return [
        result
        for before, after in zip(dense, observed, strict=False)
        if after.not_finite is None
        for result in after.metric.compared(before.found, after.found)
    ]


def _observed(metric: Metric, runner: Runner, progress: Progress, dense: Observed | None, *, kept: int) -> Observation:
    try:
        return metric.observe(runner, progress, dense=None if dense is None else dense.found)
    except CompressError as problem:
        if kept and not problem.saved:
            problem.saved = f"{kept} finished measurements: the same command goes on after them"
        raise


def _key(metric: Metric, model: Mapping[str, str], dense: Observed | None) -> str:
    facts = {**model, "metric": metric.fingerprint, "dense": dense.key if dense else None, "protocol": PROTOCOL}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
