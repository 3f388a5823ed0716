"""One model measured by itself, or beside its dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.corpora import corpus_warnings
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.measuring import comparisons, observe, prepared, results
from llmcompress.evaluation.metrics.base import Metric, Subject
from llmcompress.evaluation.settings.base import MetricSettings
from llmcompress.progress import Progress
from llmcompress.records.evaluation import Evaluation
from llmcompress.runners.base import Runner
from llmcompress.storage.cache import TensorCache, cache_folder


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


def score_cache() -> TensorCache:
    """Where everything observed of models is kept."""
    return TensorCache(cache_folder() / "scores")


def evaluation_of(
    model: EvaluatedModel, settings: Sequence[MetricSettings], progress: Progress, *, baseline: EvaluatedModel | None
) -> Evaluation:
    """Every metric of the model; with a baseline also of that, and the comparison, item by item.

    Raises: CompressError as the metrics do, and when the two models read the data as different tokens.
    """
    metrics, cache = prepared(settings, model.subject), score_cache()
    if baseline is None:
        found = observe(metrics, model.open_runner, model=model.identity, cache=cache, progress=progress)
        measurements = results(found, "model")
    else:
        _refuse_other_tokens(metrics, prepared(settings, baseline.subject), model.name, baseline.name)
        dense = observe(metrics, baseline.open_runner, model=baseline.identity, cache=cache, progress=progress)
        found = observe(metrics, model.open_runner, model=model.identity, cache=cache, progress=progress, dense=dense)
        measurements = [*results(dense, "dense"), *results(found, "compressed"), *comparisons(dense, found)]
    return Evaluation(
        model=model.name,
        baseline=baseline.name if baseline else None,
        runner=model.runner,
        versions=versions(),
        machine=machine(),
        measurements=tuple(measurements),
        warnings=(*text_warnings(metrics), *corpus_warnings(measurements)),
    )


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
