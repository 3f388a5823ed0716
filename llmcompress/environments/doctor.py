"""What is installed here, what is missing, and the command that brings it: looked up, nothing imported or loaded."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from llmcompress.environments.building import VirtualEnvironment, build_command
from llmcompress.environments.installed import OWN, requirements_of_extras, unsatisfied, version_of
from llmcompress.environments.known import ENVIRONMENTS, Environment
from llmcompress.storage.paths import cache_folder

_CORE = (OWN, "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "compressed-tensors")
_FOR_PEOPLE_WHO_CHANGE_IT = "dev"
_RUNTIMES = {
    "PyTorch": ("torch", None),
    "ONNX Runtime": ("onnxruntime", None),
    "onnxruntime-genai": ("onnxruntime-genai", None),
    "OpenVINO": ("openvino", None),
    "OpenVINO GenAI": ("openvino-genai", None),
    "llama.cpp (cyllama)": ("cyllama", None),
    "llama.cpp (programs)": (None, "llama-cli"),
    "TensorRT-LLM": ("tensorrt-llm", "trtllm-serve"),
}
"""Package, and program, of each."""


@dataclass(frozen=True)
class ExtraState:
    """One of our extras."""

    name: str
    installed: Mapping[str, str]
    """Package → version."""
    missing: tuple[str, ...]
    """Requirements that are not satisfied, each with what is there instead."""
    install: str | None
    """The command that brings what is missing; None: nothing is."""


@dataclass(frozen=True)
class EnvironmentState:
    """One environment of a tool."""

    name: str
    purpose: str
    state: str
    """`here` (the running interpreter satisfies it), `isolated` (built) or `not built`."""
    missing_here: tuple[str, ...]
    folder: str | None
    """Of the virtual environment; None where the running interpreter is used."""
    bytes_on_disk: int | None
    build: str | None
    """The command that builds it; None: nothing to build."""


@dataclass(frozen=True)
class Checkup:
    """All that `llmcompress doctor` shows."""

    python: str
    interpreter: str
    packages: Mapping[str, str | None]
    devices: tuple[str, ...]
    cache: str
    free_bytes: int
    """On the disk of the cache."""
    extras: tuple[ExtraState, ...]
    environments: tuple[EnvironmentState, ...]
    runtimes: Mapping[str, str | None]
    """Version or path; None: not found."""


def checkup() -> Checkup:
    """Look everything up; takes no second."""
    cache = cache_folder()
    return Checkup(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        interpreter=sys.executable,
        packages={name: version_of(name) for name in _CORE},
        devices=_devices(_torch_cuda(), _gpus_of_driver()),
        cache=str(cache),
        free_bytes=shutil.disk_usage(_existing(cache)).free,
        extras=tuple(
            _extra(name, needs) for name, needs in requirements_of_extras().items() if name != _FOR_PEOPLE_WHO_CHANGE_IT
        ),
        environments=tuple(map(state_of, ENVIRONMENTS.values())),
        runtimes={name: _found(package, program) for name, (package, program) in _RUNTIMES.items()},
    )


def state_of(environment: Environment) -> EnvironmentState:
    """Whether it is here, built, or to be built."""
    missing, place = unsatisfied(environment.requirements), VirtualEnvironment(environment)
    name, purpose = environment.name, environment.purpose
    if not missing:
        return EnvironmentState(name, purpose, "here", (), None, None, None)
    if place.is_complete:
        return EnvironmentState(name, purpose, "isolated", missing, str(place.folder), _size(place.folder), None)
    return EnvironmentState(name, purpose, "not built", missing, str(place.folder), None, build_command(environment))


def _extra(name: str, needs: tuple[str, ...]) -> ExtraState:
    missing = unsatisfied(needs)
    versions = ((package, version_of(package)) for package in map(_package, needs))
    installed = {package: version for package, version in versions if version is not None}
    return ExtraState(name, installed, missing, f'pip install "{OWN}[{name}]"' if missing else None)


def _package(requirement: str) -> str:
    """`onnx>=1.19` → `onnx`."""
    return Requirement(requirement).name


def _torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for, without importing it, which takes seconds; None: a CPU build."""
    spec = find_spec("torch")
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    if file is None or not file.is_file():
        return None
    cuda = runpy.run_path(str(file)).get("cuda")
    return None if cuda is None else str(cuda)


def _gpus_of_driver(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> tuple[str, ...]:
    """Names of the GPUs that NVIDIA's driver lists."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in listed.stdout.splitlines() if line.strip()) if not listed.returncode else ()


def _devices(cuda: str | None, gpus: tuple[str, ...]) -> tuple[str, ...]:
    """What `--device` can name, and GPUs that this torch cannot use."""
    found = ["cpu"]
    for number, gpu in enumerate(gpus):
        found.append(f"cuda:{number} ({gpu}, torch for CUDA {cuda})" if cuda else f"{gpu}: this torch is a CPU build")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append("mps")
    return tuple(found)


def _found(package: str | None, program: str | None) -> str | None:
    version = None if package is None else version_of(package)
    return version if version is not None or program is None else shutil.which(program)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
