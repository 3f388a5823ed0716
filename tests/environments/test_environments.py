"""Environments: the running interpreter where it will do, otherwise one that is built once, complete or absent."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from llmcompress.environments import installed
from llmcompress.environments.building import VirtualEnvironment
from llmcompress.environments.known import CPU_TORCH, ENVIRONMENTS, Environment, environment_called
from llmcompress.environments.process import Finished, Hear, call, scrubbed
from llmcompress.environments.use import is_here, python, run
from llmcompress.errors import CompressError, ExitCode
from llmcompress.progress import ProgressEvent, Silent, Told

HERE = Environment("here", "tests", ("click>=8", "psutil"), ())
ELSEWHERE = Environment("elsewhere", "tests", ("click<1", "no-such-package==3.*"), ("click==0.9",))


class FakePip:
    """Makes the interpreter of a virtual environment, and answers like pip; `fails` names a word of the command."""

    def __init__(self, *, cuda: bool = False, fails: str = "", says: str = "") -> None:
        self.commands: list[list[str]] = []
        self.variables: dict[str, str] = {}
        self._cuda, self._fails, self._says = cuda, fails, says

    def __call__(self, command: Sequence[str], variables: Mapping[str, str], hear: Hear) -> Finished:
        self.commands.append(list(command))
        self.variables = dict(variables)
        hear("Collecting something")
        if self._fails and self._fails in command:
            return Finished(1, self._says)
        if "venv" in command:
            place = Path(command[-1]) / ("Scripts" if os.name == "nt" else "bin")
            place.mkdir(parents=True)
            (place / ("python.exe" if os.name == "nt" else "python")).touch()
        if "--dry-run" in command:
            names = ["torch", *(["nvidia-cublas-cu12"] if self._cuda else [])]
            return Finished(0, json.dumps({"install": [{"metadata": {"name": name}} for name in names]}))
        return Finished(0, "")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_running_interpreter_is_taken_where_it_satisfies_all_requirements() -> None:
    pip = FakePip()
    assert is_here(HERE) and python(HERE, progress=Silent(), call=pip) == Path(sys.executable)
    assert not pip.commands


def test_what_is_missing_and_what_has_another_version_is_told() -> None:
    first, second = installed.unsatisfied(ELSEWHERE.requirements)
    assert first.startswith("click<1 (installed: 8") and second == "no-such-package==3.* (not installed)"


def test_an_environment_is_built_once_with_a_cpu_torch_first_and_pinned_afterwards(own_cache: Path) -> None:
    pip = FakePip()
    interpreter = python(ELSEWHERE, progress=Silent(), call=pip)
    assert interpreter.exists() and interpreter.is_relative_to(own_cache / "environments" / ELSEWHERE.key)
    installs = [command for command in pip.commands if "install" in command]
    assert [command[-1] for command in installs[:2]] == [CPU_TORCH, CPU_TORCH] and "--dry-run" in installs[0]
    assert installs[2][-2:] == list(ELSEWHERE.requirements)
    constraints = Path(installs[2][installs[2].index("--constraint") + 1])
    assert constraints.read_text().split() == [CPU_TORCH, *ELSEWHERE.pins]
    again = FakePip()
    assert python(ELSEWHERE, progress=Silent(), call=again) == interpreter and not again.commands


def test_where_pip_would_bring_cuda_torch_comes_from_the_index_of_cpu_builds() -> None:
    pip = FakePip(cuda=True)
    python(ELSEWHERE, progress=Silent(), call=pip)
    (by_uv,) = [command for command in pip.commands if "--torch-backend" in command]
    assert by_uv[-3:] == ["--torch-backend", "cpu", CPU_TORCH]
    assert not [each for each in pip.commands if each[-1] == CPU_TORCH and not {"--dry-run", "uv", "cpu"} & {*each}]


def test_a_build_that_was_killed_is_started_over() -> None:
    with pytest.raises(KeyboardInterrupt):
        python(ELSEWHERE, progress=Silent(), call=_killed_at("--constraint"))
    place = VirtualEnvironment(ELSEWHERE)
    assert place.python.exists() and not place.is_complete
    (place.folder / "half-installed").touch()
    python(ELSEWHERE, progress=Silent(), call=FakePip())
    assert place.is_complete and not (place.folder / "half-installed").exists()


def _killed_at(word: str) -> FakePip:
    class Killed(FakePip):
        def __call__(self, command: Sequence[str], variables: Mapping[str, str], hear: Hear) -> Finished:
            if word in command:
                raise KeyboardInterrupt
            return super().__call__(command, variables, hear)

    return Killed()


@pytest.mark.parametrize(
    ("says", "code", "exit_code"),
    [
        ("WARNING: NewConnectionError: Failed to establish a new connection", "environment.network", ExitCode.HUB),
        ("OSError: [Errno 28] No space left on device", "environment.disk-full", ExitCode.RESOURCES),
        ("ERROR: ResolutionImpossible", "environment.build", ExitCode.REFUSED),
    ],
)
def test_a_build_that_fails_says_why_and_what_to_type(says: str, code: str, exit_code: ExitCode) -> None:
    with pytest.raises(CompressError) as failed:
        python(ELSEWHERE, progress=Silent(), call=FakePip(fails="--constraint", says=says))
    told = failed.value
    assert (told.code, told.exit_code) == (code, exit_code) and says in told.what
    assert "llmcompress doctor --build elsewhere" in told.fix and "no-such-package" in told.where
    assert not VirtualEnvironment(ELSEWHERE).is_complete


def test_two_builds_at_once_are_one(own_cache: Path) -> None:
    place, notes = VirtualEnvironment(ELSEWHERE), []
    place.folder.parent.mkdir(parents=True)
    other = FileLock(place.folder.with_name(f"{place.folder.name}.lock"))
    other.acquire()
    pip, progress = FakePip(), Told(lambda event: notes.append(event.note))
    waiting = threading.Thread(target=lambda: python(ELSEWHERE, progress=progress, call=pip))
    waiting.start()
    while not any("another process" in note for note in notes):
        time.sleep(0.01)
    _finish(place)
    other.release()
    waiting.join()
    assert place.is_complete and not pip.commands


def _finish(place: VirtualEnvironment) -> None:
    place.python.parent.mkdir(parents=True)
    place.python.touch()
    (place.folder / "llmcompress-stamp.json").touch()


def test_a_tool_gets_no_token_and_no_packages_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"PATH": "p", "HF_TOKEN": "hf_x", "AWS_SECRET_ACCESS_KEY": "k", "PYTHONPATH": "a", "OMP_NUM_THREADS": "1",
             "PIP_INDEX_URL": "https://user:word@index", "GITHUB_TOKEN": "g", "https_proxy": "q"}  # fmt: skip
    assert scrubbed(given) == {"PATH": "p", "OMP_NUM_THREADS": "1"}
    assert scrubbed(given, installing=True).keys() == {"PATH", "OMP_NUM_THREADS", "PIP_INDEX_URL", "https_proxy"}
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    said = run(HERE, ["-c", "import os; print(sorted(os.environ))"], doing="look", progress=Silent())
    assert "HF_TOKEN" not in said and "HF_HUB_OFFLINE" in said


def test_what_a_tool_writes_is_progress_and_what_it_says_last_is_the_error() -> None:
    events: list[ProgressEvent] = []
    program = "import sys; print('10%', end='\\r'); print('20%'); sys.exit('no such operator')"
    with pytest.raises(CompressError, match="no such operator") as failed:
        run(HERE, ["-c", program], doing="export", progress=Told(events.append))
    assert [event.text for event in events][:2] == ["export: 10%", "export: 20%"]
    assert "exit code 1" in failed.value.where


def test_an_interrupt_ends_a_tool_with_its_children() -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pids: list[int] = []

    def hear(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call([sys.executable, "-c", parent], os.environ, hear)
    gone = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)[1]
    assert pids and not gone


def test_known_environments_pin_what_they_require() -> None:
    from packaging.requirements import Requirement

    for environment in ENVIRONMENTS.values():
        pinned = {Requirement(pin).name: next(iter(Requirement(pin).specifier)).version for pin in environment.pins}
        for text in environment.requirements:
            requirement = Requirement(text)
            assert requirement.specifier.contains(pinned[requirement.name]), text
    with pytest.raises(CompressError, match="optimum-onnx"):
        environment_called("optimum-onx")


def test_extras_inside_extras_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours:
        metadata = type("M", (), {"get_all": staticmethod(lambda name: ["inner", "outer"])})
        requires = ("click>=8", 'a>=1; extra == "inner"', 'llmcompress[inner]; extra == "outer"', 'b; extra == "outer"')

    monkeypatch.setattr(installed.metadata, "distribution", lambda name: Ours)
    assert installed.requirements_of_extras() == {"inner": ("a>=1",), "outer": ("a>=1", "b")}
