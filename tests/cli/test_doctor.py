"""`llmcompress doctor`: each environment with the command that builds it, and all of it without importing PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmcompress.cli.doctor import doctor
from llmcompress.environments.building import VirtualEnvironment
from llmcompress.environments.known import ENVIRONMENTS
from llmcompress.errors import CompressError

ROOT = Path(__file__).parent.parent.parent


def test_it_looks_everything_up_without_importing_torch() -> None:
    program = """
import sys
from llmcompress.cli.main import main
try:
    main(["doctor", "--json"])
except SystemExit as exit:
    assert not exit.code
heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] and found["devices"][0] == "cpu" and found["free_bytes"] > 0
    assert {each["name"] for each in found["environments"]} == ENVIRONMENTS.keys()


def test_an_environment_is_here_isolated_or_has_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    asked = lambda: json.loads(CliRunner().invoke(doctor, ["--json"], catch_exceptions=False).stdout)  # noqa: E731
    name = next((each["name"] for each in asked()["environments"] if each["state"] == "not built"), None)
    for each in asked()["environments"]:
        assert each["state"] in ("here", "not built")
        assert each["build"] == (None if each["state"] == "here" else f"llmcompress doctor --build {each['name']}")
    if name is not None:
        place = VirtualEnvironment(ENVIRONMENTS[name])
        place.python.parent.mkdir(parents=True)
        place.python.write_bytes(b"x" * 1000)
        (place.folder / "llmcompress-stamp.json").touch()
        (state,) = [each for each in asked()["environments"] if each["name"] == name]
        assert state["state"] == "isolated" and state["bytes_on_disk"] == 1000 and state["build"] is None
        assert state["missing_here"]
        assert "isolated" in CliRunner().invoke(doctor, [], catch_exceptions=False).stdout


def test_an_unknown_environment_is_a_usage_error() -> None:
    with pytest.raises(CompressError, match="optimum-onnx"):
        CliRunner().invoke(doctor, ["--build", "optimum-onx"], catch_exceptions=False)
