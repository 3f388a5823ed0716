"""From a machine that has only Python to a result, in one command; a second time it starts at once.

    python3 scripts/bootstrap.py run                   set up .venv, compress the bundled model, show before and after
    python3 scripts/bootstrap.py test [pytest args]    set up .venv with the test tools, run the tests
    python3 scripts/bootstrap.py setup                 set up only

`--transformers 4` does the same with the older major version of transformers, in .venv-transformers4; without further
arguments `test` then runs only what touches transformers.
Standard library only. Without an NVIDIA GPU a CPU build of torch is installed first and pinned for everything
that comes after it, because any later requirement could otherwise replace it by gigabytes of CUDA packages.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0"
"""The version the project is tested with on CPUs; machines with a GPU get the newest."""
OTHER_PINS = {
    "4": ["transformers>=4.57,<4.58", "compressed-tensors<0.18", "onnxruntime-genai<0.16"],
    "5": ["transformers>=5,<6"],
}
"""compressed-tensors 0.18 and later cannot load asymmetric int4 under transformers 4.57, and the model builder of
onnxruntime-genai 0.16 and later needs transformers 5."""
TEST_EXTRAS = {"4": "dev,onnx-export,openvino-export,genai", "5": "dev"}
"""Optimum's exporters to ONNX and OpenVINO need transformers 4.57."""
OLDER_MAJOR = ["-m", "(majors or transformers4) and not slow", "--families", "core", "--presets", "quarter"]
"""What is tested under the older major unless tests are named: whatever touches transformers (tests/selection.py)."""
MAIN_JOB = [
    *("compress", "builtin:books-llama", "--preset", "tiny/awq-gptq", "-o", "out/books-llama-w4", "--overwrite"),
    *("--set", "calibration.samples=48", "--set", "evaluate.perplexity=[builtin:evaluation]"),
]
"""4-bit weights, calibrated on the bundled text, measured on all of the other bundled text."""


class SetupError(Exception):
    """Something on this machine that the user must change; the text says what."""


def main() -> int:
    """Parse, set up, run; the exit code is that of the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["run", "test", "setup"])
    parser.add_argument("--transformers", choices=sorted(OTHER_PINS), default="5", help="major version")
    given, pytest_args = parser.parse_known_args()
    if pytest_args and given.job != "test":
        parser.error(f"{given.job} takes no further arguments: {' '.join(pytest_args)}")
    try:
        check_python()
        folder = ROOT / (".venv" if given.transformers == "5" else f".venv-transformers{given.transformers}")
        environment = Environment(folder, given.transformers)
        environment.set_up(with_tests=given.job == "test")
    except SetupError as problem:
        print(f"bootstrap: {problem}", file=sys.stderr)
        return 3
    except subprocess.CalledProcessError as problem:
        command = " ".join(str(part) for part in problem.cmd)
        print(f"bootstrap: this command failed, its own message is above:\n  {command}", file=sys.stderr)
        return 3
    if given.job == "test":
        chosen = pytest_args or ([] if given.transformers == "5" else OLDER_MAJOR)
        return environment.call("python", "-m", "pytest", *workers(chosen), *chosen)
    return environment.call("llmcompress", *MAIN_JOB) if given.job == "run" else 0


def check_python() -> None:
    """Refuse a Python that is too old or cannot make virtual environments.

    Raises: SetupError saying what to install.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (this file must still parse where it refuses to run)
        raise SetupError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]} ({sys.executable})")
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        raise SetupError("this Python has no venv module; on Debian and Ubuntu: sudo apt install python3-venv")


def workers(pytest_args: list[str]) -> list[str]:
    """Test processes: one per core, at most four, unless the user says."""
    chosen = any(arg.startswith(("-n", "--numprocesses", "--pdb")) for arg in pytest_args)
    return [] if chosen else ["-n", str(min(4, os.cpu_count() or 1))]


class Environment:
    """A virtual environment with llmcompress in it."""

    def __init__(self, folder: Path, transformers: str) -> None:
        self.folder, self.transformers = folder, transformers
        self.stamp, self.constraints = folder / "llmcompress-stamp.json", folder / "llmcompress-constraints.txt"

    def program(self, name: str) -> str:
        """Path of a program of the environment."""
        return str(self.folder / ("Scripts" if os.name == "nt" else "bin") / name)

    def call(self, name: str, *arguments: str) -> int:
        """Run a program of the environment from the project's root, without the network."""
        command = [self.program(name), *arguments]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode

    def set_up(self, *, with_tests: bool) -> None:
        """Create the environment and install what is missing; nothing to do when the stamp says so.

        Raises: SetupError, or CalledProcessError when an installation fails.
        """
        inputs = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes() + self.transformers.encode()
        wanted = {"inputs": hashlib.sha256(inputs).hexdigest(), "place": str(ROOT), "tests": with_tests}
        done = json.loads(self.stamp.read_text()) if self.stamp.exists() else {}
        if done in (wanted, {**wanted, "tests": True}):
            return
        self.stamp.unlink(missing_ok=True)
        if not self.has_pip():
            say(f"creating {self.folder.name}")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        has_gpu = sees_gpu()
        if "torch" not in self.installed():
            self.install_torch(has_gpu)
        self.constraints.write_text("\n".join([f"torch=={self.installed()['torch']}", *OTHER_PINS[self.transformers]]))
        say("installing llmcompress and what it needs" + (", with the test tools" if with_tests else ""))
        extras = f".[{TEST_EXTRAS[self.transformers]}]" if with_tests else "."
        self.pip("install", "--constraint", str(self.constraints), "--editable", extras)
        cuda = [name for name in self.installed() if is_cuda(name)]
        if cuda and not has_gpu:
            raise SetupError(f"there is no GPU, yet these were installed: {', '.join(cuda)}; remove {self.folder.name}")
        self.stamp.write_text(json.dumps(wanted))

    def install_torch(self, has_gpu: bool) -> None:
        """Torch for this machine, and nothing of CUDA where there is no GPU."""
        if has_gpu:
            say("installing torch for the NVIDIA GPU of this machine (gigabytes)")
            self.pip("install", "torch")
        elif self.pip_would_stay_clear_of_cuda():
            say(f"installing {CPU_TORCH}")
            self.pip("install", CPU_TORCH)
        else:
            say(f"installing the CPU build of {CPU_TORCH} with uv, which knows where it is")
            self.pip("install", "uv")
            uv = [self.program("uv"), "pip", "install", "--python", self.program("python")]
            subprocess.run([*uv, "--torch-backend", "cpu", CPU_TORCH], check=True)

    def pip_would_stay_clear_of_cuda(self) -> bool:
        """Whether plain pip finds a CPU build: on macOS, on Windows, and where CPU wheels are provided locally."""
        dry_run = [self.program("python"), "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", CPU_TORCH]
        asked = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True)
        if asked.returncode:
            return False
        return not any(is_cuda(item["metadata"]["name"]) for item in json.loads(asked.stdout)["install"])

    def pip(self, *arguments: str) -> None:
        """Run pip of the environment, quietly."""
        subprocess.run([self.program("python"), "-m", "pip", *arguments, "--quiet"], cwd=ROOT, check=True)

    def installed(self) -> dict[str, str]:
        """Names and versions of everything installed."""
        ask = (
            "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
        )
        found = subprocess.run([self.program("python"), "-c", ask], capture_output=True, text=True, check=True)
        return {name.lower(): version for name, version in json.loads(found.stdout)}

    def has_pip(self) -> bool:
        """Whether the environment exists in full; one killed while it was made does not count."""
        ask = [self.program("python"), "-m", "pip", "--version"]
        try:
            return subprocess.run(ask, capture_output=True).returncode == 0
        except OSError:
            return False


def is_cuda(distribution: str) -> bool:
    """Whether a package belongs to CUDA."""
    return distribution.lower().startswith(("nvidia", "cuda", "triton"))


def sees_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def say(step: str) -> None:
    """One line per step, as soon as it starts."""
    print(f"bootstrap: {step}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
