"""One model measured by itself, or beside its dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.corpora import corpus_warnings
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.gate import check_gate, gate_of, judged
from llmcompress.evaluation.measuring import Observed, comparisons, observe, prepared, results
from llmcompress.evaluation.metrics.base import Metric, Subject
from llmcompress.evaluation.settings.base import MetricSettings
from llmcompress.progress import Progress
from llmcompress.records.evaluation import Compression, Evaluation
from llmcompress.records.measurements import Measurement, WeightBytes, Which
from llmcompress.runners.base import Runner
from llmcompress.storage.cache import TensorCache
from llmcompress.storage.paths import cache_folder


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that can be run, and what must be known of it before."""

    name: str
    subject: Subject
    identity: Mapping[str, str]
    """Whatever decides its numbers."""
    runner: str
    """The name of the runtime."""
    open_runner: Callable[[], Runner]
    bytes_on_disk: int | None = None
    """Of its weight files; None: it is in memory."""
    compression: Compression | None = None
    """How it was made, where that is known."""


def score_cache() -> TensorCache:
    """Where everything observed of models is kept."""
    return TensorCache(cache_folder() / "scores")


def evaluation_of(
    model: EvaluatedModel, settings: Sequence[MetricSettings], progress: Progress, *, baseline: EvaluatedModel | None
) -> Evaluation:
    """Every metric of the model; with a baseline also of that, and the comparison, item by item.

    Raises: CompressError as the metrics do, and when the two models read the data as different tokens.
    """
    *_, last = evaluations(model, settings, progress, baseline=baseline)
    return last


def evaluations(
    model: EvaluatedModel, settings: Sequence[MetricSettings], progress: Progress, *, baseline: EvaluatedModel | None
) -> Iterator[Evaluation]:
    """The same, after every metric of every model what is found so far; the last one has everything.

    Raises: CompressError like `evaluation_of`.
    """
    check_gate(settings, compares=baseline is not None)
    metrics, cache, gate = prepared(settings, model.subject), score_cache(), gate_of(settings)
    dense: list[Observed] = []
    found: list[Observed] = []

    def so_far(*, finished: bool = False) -> Evaluation:
        measured = _measurements(model, found, dense, baseline)
        left = () if finished else tuple(metric.name for metric in metrics[len(found) :])
        return Evaluation(
            model=model.name,
            baseline=baseline.name if baseline else None,
            runner=model.runner,
            versions=versions(),
            machine=machine(),
            measurements=tuple(measured + (judged(settings, measured) if finished else [])),
            warnings=(*text_warnings(metrics), *corpus_warnings(measured)),
            unfinished=left,
            compression=model.compression,
        )

    if baseline is not None:
        _refuse_other_tokens(metrics, prepared(settings, baseline.subject), model.name, baseline.name)
        for each in observe(metrics, baseline.open_runner, model=baseline.identity, cache=cache, progress=progress):
            dense.append(each)
            yield so_far()
    for each in observe(
        metrics,
        model.open_runner,
        model=model.identity,
        cache=cache,
        progress=progress,
        dense=None if baseline is None else dense,
        keep_not_finite=gate is not None and bool(gate.finite),
    ):
        found.append(each)
        yield so_far()
    yield so_far(finished=True)


def _measurements(
    model: EvaluatedModel, found: Sequence[Observed], dense: Sequence[Observed], baseline: EvaluatedModel | None
) -> list[Measurement]:
    """What is known of both models, and of their difference."""
    of: Which = "model" if baseline is None else "compressed"
    both: tuple[tuple[Which, EvaluatedModel | None], ...] = (("dense", baseline), (of, model))
    sizes = [
        WeightBytes(of=whose, bytes=each.bytes_on_disk)
        for whose, each in both
        if each is not None and each.bytes_on_disk is not None
    ]
    return [*sizes, *results(dense, "dense"), *results(found, of), *comparisons(dense, found)]


def text_warnings(metrics: Iterable[Metric]) -> tuple[str, ...]:
    """What is odd about the texts, each once."""
    found = (f"{text.name}: {each}" for metric in metrics for text in metric.texts for each in text.warnings)
    return tuple(dict.fromkeys(found))


def _refuse_other_tokens(ours: Sequence[Metric], theirs: Sequence[Metric], model: str, baseline: str) -> None:
    """What is compared item by item must be the same items.

    Raises: CompressError naming what they read differently.
    """
    for one, other in zip(ours, theirs, strict=True):
        if one.fingerprint != other.fingerprint:
            raise CompressError(
                "evaluate.other-tokens",
                f"{model} and {baseline} read {one.name} as different tokens or windows",
                where="baseline",
                fix="give the dense model that this one was made from, or a window that both models allow; models with "
                "different tokenizers can be compared by bits per byte, each measured by itself",
                exit_code=ExitCode.USAGE,
            )
