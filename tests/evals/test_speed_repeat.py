"""The stored check of repeatability says what it may: a claim about an idle machine is not made on a busy one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from speed_repeat import CLAIM, IDLE, compared

RESULTS = Path(__file__).resolve().parents[2] / "evals" / "results"


def row(median: float) -> dict[str, object]:
    return {"model": "m", "phase": "decode", "threads": 1, "cores": [0], "median": median, "spread": 0.1}


@pytest.mark.parametrize("medians", [(100.0, 104.0), (104.0, 100.0)])
def test_two_runs_differ_by_a_share_of_the_slower_one(medians: tuple[float, float]) -> None:
    (found,) = compared(*([row(median)] for median in medians))
    assert found["difference"] == 0.04 and found["medians"] == list(medians)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("repeat-speed-*.json")), ids=lambda path: path.stem)
def test_a_stored_result_claims_only_what_was_measured_on_an_idle_machine(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["idle"] == (max(found["used_by_others"]) <= IDLE)
    worst = max(each["difference"] for each in found["rows"])
    assert found["holds"] == (worst <= CLAIM if found["idle"] else None)
