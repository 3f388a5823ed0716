"""Sends the numbers of an evaluation to an experiment tracker through accelerate; nothing is sent unless asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import CompressError, ExitCode, did_you_mean
from llmcompress.records.evaluation import Evaluation, Measured
from llmcompress.report.kinds import lines

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "llmcompress"


def check_tracker(name: str) -> None:
    """Before any work: that accelerate knows the tracker and its package is there.

    Raises: CompressError naming the nearest tracker, or the package to install.
    """
    _tracker_class(name)


def track(measured: Measured, to: str, *, settings: Mapping[str, Any] | None = None, folder: str | Path = ".") -> None:
    """Log every number of a report or an evaluation, and what was evaluated, as one run of a tracker.

    `to`: `trackio`, `wandb`, `tensorboard`, `mlflow`, or any that accelerate knows; `folder`: where a tracker that
    writes files keeps them, in `llmcompress`.

    Raises: CompressError if there is no such tracker, or its package is missing.
    """
    from accelerate import PartialState

    PartialState()  # accelerate's trackers ask it which process they are in
    kind: type[GeneralTracker] = _tracker_class(to)
    tracker = kind(PROJECT, logging_dir=str(folder)) if kind.requires_logging_directory else kind(PROJECT)
    tracker.start()
    try:
        tracker.store_init_configuration({**_facts(measured), **(settings or {})})
        tracker.log(scalars(measured), step=0)
    finally:
        tracker.finish()


def scalars(measured: Measured) -> dict[str, float]:
    """Every number under a name such as `compressed/perplexity on wikitext2:test`, with its change."""
    found: dict[str, float] = {}
    for line in lines(measured):
        if line.dense is not None:
            found[f"dense/{line.title}"] = line.dense
        if line.value is not None:
            found[f"{'compressed' if line.dense is not None else 'model'}/{line.title}"] = line.value
        if line.change is not None:
            found[f"change/{line.title}"] = line.change.value
    return found


def _facts(measured: Measured) -> dict[str, str]:
    """What was evaluated, as trackers take it."""
    facts: dict[str, str] = {"model": str(getattr(measured, "model", ""))}
    if isinstance(measured, Evaluation):
        facts |= {"baseline": measured.baseline or "", "runner": measured.runner}
        facts |= {f"version/{name}": version for name, version in measured.versions.items()}
    return facts


def _tracker_class(name: str) -> type[GeneralTracker]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known: dict[str, type[GeneralTracker]] = {str(each): cls for each, cls in LOGGER_TYPE_TO_CLASS.items()}
    if name not in known:
        raise CompressError(
            "track.unknown",
            f"unknown tracker {name!r}",
            fix=did_you_mean(name, known),
            exit_code=ExitCode.USAGE,
        )
    own = known[name].__module__ == "accelerate.tracking"
    if own and name not in [str(each) for each in get_available_trackers()]:
        raise CompressError(
            "track.missing",
            f"the tracker {name} is not installed",
            fix=f"pip install {name.replace('_', '-')}",
            exit_code=ExitCode.REFUSED,
        )
    return known[name]
