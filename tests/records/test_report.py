"""Reports: what is written comes back, kinds of other versions survive, another form is refused in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmcompress.errors import CompressError
from llmcompress.records.measurements import OtherMeasurement, PerplexityResult, StageSeconds, WeightBytes
from llmcompress.records.report import REPORT, VERSION, Report, read_report

UNKNOWN = {"kind": "energy", "joules_per_token": 0.25, "by": {"counter": "rapl", "zones": [0, 1]}}


def perplexity(of: str, value: float, text: str = "a") -> PerplexityResult:
    return PerplexityResult(of=of, text=text, window=8, bos=True, tokens=70, perplexity=value, bits_per_byte=1.0)


def report(*measurements) -> Report:
    return Report(
        model="m", recipe_hash="0", versions={}, machine={}, calibration_tokens=0, sites=(), refused={},
        measurements=measurements,
    )  # fmt: skip


def test_what_is_written_comes_back_whatever_else_was_measured(tmp_path: Path) -> None:
    written = report(perplexity("dense", 2.0), WeightBytes(of="dense", bytes=7), StageSeconds(stage="load", seconds=1))
    data = json.loads(written.model_dump_json())
    data["measurements"].insert(1, UNKNOWN)
    (tmp_path / REPORT).write_text(json.dumps(data))
    found = read_report(tmp_path)
    assert isinstance(found.measurements[1], OtherMeasurement)
    assert json.loads(found.model_dump_json()) == data
    assert (found.bytes_dense, found.bytes_compressed, found.seconds) == (7, 0, {"load": 1.0})
    assert read_report(tmp_path / REPORT) == found


@pytest.mark.parametrize("measurement", [{"kind": "weight_bytes", "of": "dense"}, {"kind": ["seconds"]}])
def test_a_known_kind_must_be_what_it_says_and_a_kind_a_name(measurement: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate({**report().model_dump(), "measurements": [measurement]})


def test_the_same_measurement_before_and_after_makes_a_pair_and_nothing_else_does() -> None:
    found = report(
        perplexity("dense", 2.0), perplexity("dense", 4.0, "b"), perplexity("dense", 9.0, "c"),
        perplexity("compressed", 5.0, "b"), perplexity("compressed", 3.0), perplexity("model", 1.0, "c"),
    ).quality  # fmt: skip
    assert [(each.dense.text, each.ratio) for each in found] == [("a", 1.5), ("b", 1.25)]
    assert found[0].divergence is None and found[0].ratio_error is None


@pytest.mark.parametrize(("version", "fix"), [(VERSION + 1, "newer llmcompress"), (None, "compress the model again")])
def test_another_form_is_refused_with_what_to_do(version: int | None, fix: str, tmp_path: Path) -> None:
    data = {**json.loads(report().model_dump_json()), "version": version}
    (tmp_path / REPORT).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    with pytest.raises(CompressError) as told:
        read_report(tmp_path)
    assert told.value.code == "report.version" and fix in told.value.fix


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}'])
def test_a_damaged_report_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(text)
    with pytest.raises(CompressError) as told:
        read_report(tmp_path)
    assert told.value.code == "report.unreadable" and REPORT in told.value.where
