"""The example programs of the documents run from an empty folder, without a network, and what they show is true."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.test_imports import ROOT

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_two_models_are_compared(run, capsys):
    found = run("compare_two")["found"]
    rtn, gptq = (each.quality[0].divergence.kl.mean for each in found.evaluations)
    assert gptq < rtn
    assert Path(capsys.readouterr().out.splitlines()[-1]).is_file()


def test_healing_regains_quality(run):
    names = run("prune_and_heal")
    pruned, healed = (names[which].report.quality[0].compressed.perplexity for which in ("pruned", "healed"))
    assert healed < 0.95 * pruned


def test_a_student_learns(run):
    names = run("distill_a_student")
    before, after = (names[which].report.quality[0].compressed.perplexity for which in ("before", "after"))
    assert after < 0.9 * before


def test_any_text_calibrates(run):
    names = run("your_own_text")
    assert names["made"].report.sites and names["other"].report.sites


def test_an_export_is_run_by_its_runtime(run):
    names = run("export_and_run")
    assert names["report"].read_back and not names["report"].differing
    assert names["report"].runtime is not None


def test_every_example_has_a_test():
    tested = {"compare_two", "prune_and_heal", "distill_a_student", "your_own_text", "export_and_run"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
