"""The set-up program chooses the right torch, refuses what it must, and does nothing the second time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(bootstrap, monkeypatch, tmp_path):
    """A machine that records commands instead of running them; `report` is what pip would install for torch."""
    made = SimpleNamespace(commands=[], report=["torch"], packages={"torch": "2.13.0+cpu", "numpy": "2.4"}, fails=False)

    def run(command, **_):
        made.commands.append([Path(command[0]).name, *command[1:]])
        out = ""
        if "--dry-run" in command:
            out = json.dumps({"install": [{"metadata": {"name": name}} for name in made.report]})
        elif command[1] == "-c":
            out = json.dumps(list(made.packages.items()))
        elif command[0] == "nvidia-smi":
            out = "GPU 0: something"
        return subprocess.CompletedProcess(command, int(made.fails), out, "")

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda _: None)
    made.environment = bootstrap.Environment(tmp_path, "5")
    return made


def torch_commands(machine):
    return [" ".join(command) for command in machine.commands if "torch" in " ".join(command) and "-c" not in command]


def test_pip_installs_torch_where_it_finds_a_cpu_build(machine):
    machine.environment.install_torch(has_gpu=False)
    assert torch_commands(machine)[-1].startswith("python -m pip install torch==")


@pytest.mark.parametrize("package", ["nvidia-cublas", "cuda-bindings", "triton"])
def test_uv_installs_the_cpu_build_where_pip_would_bring_cuda(machine, package):
    machine.report = ["torch", package]
    machine.environment.install_torch(has_gpu=False)
    assert (
        torch_commands(machine)[-1].startswith("uv pip install")
        and "--torch-backend cpu" in torch_commands(machine)[-1]
    )


def test_uv_is_asked_where_pip_finds_no_torch_at_all(machine):
    machine.fails = True
    assert not machine.environment.pip_would_stay_clear_of_cuda()


def test_a_gpu_gets_the_newest_torch(machine):
    machine.environment.install_torch(has_gpu=True)
    assert torch_commands(machine) == ["python -m pip install torch --quiet"]


def test_torch_comes_first_and_is_pinned_for_everything_after(machine, tmp_path):
    machine.environment.set_up(with_tests=True)
    install = machine.commands[-2]
    assert install[install.index("--constraint") + 1] == str(tmp_path / "llmcompress-constraints.txt")
    assert "torch==2.13.0+cpu" in (tmp_path / "llmcompress-constraints.txt").read_text()


def test_the_second_time_nothing_is_run(machine):
    machine.environment.set_up(with_tests=True)
    machine.commands.clear()
    machine.environment.set_up(with_tests=True)
    machine.environment.set_up(with_tests=False)
    assert machine.commands == []


def test_cuda_packages_on_a_machine_without_a_gpu_are_an_error(bootstrap, machine, tmp_path):
    machine.packages["nvidia-cublas"] = "13"
    with pytest.raises(bootstrap.SetupError, match="nvidia-cublas"):
        machine.environment.set_up(with_tests=False)
    assert not (tmp_path / "llmcompress-stamp.json").exists()


def test_an_old_python_is_refused_in_one_line(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 10, 0))
    monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py", "setup"])
    assert bootstrap.main() == 3
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err


def test_a_python_without_venv_is_told_which_package_is_missing(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bootstrap.SetupError, match="apt install python3-venv"):
        bootstrap.check_python()


@pytest.mark.parametrize(
    ("words", "everything"),
    [(["--transformers", "4"], False), (["--transformers", "4", "--all"], True), ([], True), (["-k", "gptq"], True)],
    ids=str,
)
def test_the_older_major_runs_what_touches_transformers_unless_told_otherwise(
    bootstrap, machine, monkeypatch, words, everything
):
    monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py", "test", *words])
    monkeypatch.setattr(bootstrap.Environment, "set_up", lambda *_, **__: None)
    bootstrap.main()
    assert ("(majors or transformers4) and not slow" not in machine.commands[-1]) == everything
