"""The rules of the suite itself: what has its turn, what a file may cost, what a warm Python forgets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cpu_budget import BUDGET_SECONDS, DEFAULT_SECONDS, PROPERTY, CpuBudget
from tests.families import FAMILIES
from tests.selection import CORE, MAJORS, TURN, Selection
from tests.warm_python import ROOT, WarmPython


def item(test: str, *marks: str, **parameters: str) -> Any:
    nodeid = f"{test}[{'-'.join(parameters.values())}]" if parameters else test
    call = SimpleNamespace(params=parameters)
    return SimpleNamespace(nodeid=nodeid, callspec=call, get_closest_marker=lambda name: name in marks or None)


def left(selection: Selection, items: list[Any]) -> list[str]:
    gone = selection.deselect(items)
    return [each.callspec.params.get("family") or each.callspec.params["preset"] for each in items if each not in gone]


def test_a_commit_runs_the_same_every_time_and_few_commits_run_everything() -> None:
    turns = [Selection(f"{number:040x}", "rotating", "all").chosen_families() for number in range(60)]
    assert turns == [Selection(f"{number:040x}", "rotating", "all").chosen_families() for number in range(60)]
    assert all(set(CORE) < turn and len(turn) == len(CORE) + TURN for turn in turns)
    assert set.union(*turns) == set(FAMILIES)
    names = [f"recipe {number:02d}" for number in range(9)]
    quarters = [Selection(f"{number:040x}", "rotating", "all").quarter(names) for number in range(60)]
    assert set.union(*map(set, quarters)) == set(names) and {len(quarter) for quarter in quarters} == {2, 3}


def test_only_products_of_passes_and_all_families_take_turns() -> None:
    core = Selection("any", "core", "all")
    in_passes = [item("tests/passes/test_a.py::test_b", family=family) for family in FAMILIES]
    assert set(left(core, in_passes)) == set(CORE)
    assert set(left(Selection("any", "all", "all"), in_passes)) == set(FAMILIES)
    for kept in (
        [item("tests/model/test_a.py::test_b", family=family) for family in FAMILIES],
        [item("tests/passes/test_a.py::test_b", "every_family", family=family) for family in FAMILIES],
        [item("tests/passes/test_a.py::test_b", family=family) for family in ("bloom", "mistral", "cohere")],
    ):
        assert len(left(core, kept)) == len(kept)


def test_presets_take_turns_where_that_is_asked_for() -> None:
    presets = [item("tests/test_a.py::test_b", preset=f"tiny/{number}") for number in range(8)]
    assert len(left(Selection("any", "core", "quarter"), presets)) == 2
    assert len(left(Selection("any", "core", "all"), presets)) == 8


def test_files_and_folders_that_rules_name_are_there() -> None:
    assert not [path for path in (*MAJORS, *BUDGET_SECONDS) if not (ROOT / path).exists()]


def test_a_file_over_its_budget_fails_the_run_and_is_named() -> None:
    session, lines = SimpleNamespace(exitstatus=pytest.ExitCode.OK), []
    terminal = SimpleNamespace(line=lambda text, **_: lines.append(text))
    budget = CpuBudget(enforced=True)
    for used, status in ((DEFAULT_SECONDS - 1, pytest.ExitCode.OK), (2, pytest.ExitCode.TESTS_FAILED)):
        report = SimpleNamespace(nodeid="tests/test_new.py::test_a", user_properties=[(PROPERTY, used)])
        budget.pytest_runtest_logreport(report)
        budget.pytest_sessionfinish(session)
        assert session.exitstatus == status
    budget.pytest_terminal_summary(terminal, SimpleNamespace(getoption=lambda _: False))
    assert len(lines) == 1 and "tests/test_new.py used 21 CPU seconds, its budget is 20" in lines[0]


def test_a_warm_python_runs_programs_as_python_does_and_forgets_them(stock_python: WarmPython, tmp_path: Path) -> None:
    run = stock_python.run
    said = run("import os, sys, torch\ntorch.kept = 1\nprint(sys.argv[1:], os.getcwd())", "a b", 3, folder=tmp_path)
    assert (said.returncode, said.stdout) == (0, f"['a b', '3'] {tmp_path}\n")
    assert run("import torch, sys; sys.exit(hasattr(torch, 'kept'))").returncode == 0
    assert run("import sys; sys.exit('no')").stderr == "no\n"
    failed = run("raise ValueError('why')")
    assert failed.returncode == 1 and failed.stderr.endswith("ValueError: why\n")
    assert run("import os; os._exit(9)").returncode == 9
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -9


def test_the_stock_one_has_never_seen_us(stock_python: WarmPython) -> None:
    ours = "print([name for name in sys.modules if name.startswith(('llmcompress', 'tests'))], len(sys.modules) > 500)"
    assert stock_python.run("import sys\n" + ours).stdout == "[] True\n"
    assert stock_python.run("import llmcompress; print(llmcompress.__file__)", imports_us=True).stdout.startswith(
        str(ROOT)
    )


def test_when_one_of_several_processes_fails_none_waits_for_ever(our_python: WarmPython, tmp_path: Path) -> None:
    program = "import os, time\nif os.environ['RANK'] == '1': raise SystemExit(3)\ntime.sleep(200)"
    done = our_python.run_ranks(program, count=2, folder=tmp_path)
    assert [each.returncode for each in done] == [-9, 3]
