"""Trackers get every number under its name, through accelerate's interface, and only those that are there."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from llmcompress.errors import CompressError, ExitCode
from llmcompress.report.tracking import check_tracker, track
from tests.report.example import evaluation


class Remembering(GeneralTracker):
    """What accelerate's trackers are asked for, noted."""

    name = "remembering"
    requires_logging_directory = False
    calls: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.calls.clear()

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.calls.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("settings", values))

    def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_numbers_of_both_models_and_their_change_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "remembering", Remembering)
    track(evaluation(), "remembering", settings={"recipe": "0123"})
    names = [name for name, _ in Remembering.calls]
    told = dict(Remembering.calls)
    assert names == ["start", "settings", "log", "finish"]
    assert told["settings"]["recipe"] == "0123" and told["settings"]["baseline"] == "dense"
    logged = told["log"]
    assert logged["dense/perplexity on wikitext2:test"] == 20.0
    assert logged["compressed/perplexity on wikitext2:test"] == 20.24
    assert logged["change/weight files"] == pytest.approx(100 / 360)


def test_an_unknown_tracker_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(CompressError, match="unknown tracker 'tensorbord'") as refused:
        check_tracker("tensorbord")
    assert "`tensorboard`" in refused.value.fix and refused.value.exit_code is ExitCode.USAGE


def test_a_tracker_without_its_package_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(CompressError, match="wandb is not installed") as refused:
        check_tracker("wandb")
    assert refused.value.fix == "pip install wandb"
