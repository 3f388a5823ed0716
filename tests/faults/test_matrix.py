"""The matrix of faults is complete, and every test that it names exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

TESTS = Path(__file__).resolve().parents[1]
COUNTS = {"A": 24, "B": 12, "C": 12, "D": 11, "E": 10, "F": 12, "G": 7, "H": 12}
"""Faults of the input model, security, recipe and command line, data, numerics, resources, search, publishing."""
MATRIX: dict[str, dict[str, Any]] = yaml.safe_load((TESTS / "faults" / "matrix.yaml").read_text(encoding="utf-8"))


def test_a_hundred_faults_have_a_row_each():
    assert list(MATRIX) == [f"{area}{number}" for area, count in COUNTS.items() for number in range(1, count + 1)]


@pytest.mark.parametrize("row", MATRIX.values(), ids=list(MATRIX))
def test_a_row_says_what_must_happen_and_which_tests_show_it(row):
    assert row["fault"] and row["must"]
    assert row["tests"] and row.keys() <= {"fault", "must", "tests", "program", "stands_in"}
    for test in row["tests"]:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), test
    if "program" in row:
        assert (TESTS.parent / "evals" / row["program"]).is_file()
