"""Versions and machine for reports: enough to reproduce a number, nothing that identifies a person or host."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

_PACKAGES = ("llmcompress", "torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def numeric_versions() -> dict[str, str]:
    """Of the packages that decide the last digits of a logit."""
    return {name: _version(name) for name in ("torch", "transformers")}


def machine() -> dict[str, str]:
    """Processor, cores this process may use, memory, GPUs, operating system."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": str(_usable_cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": _gpus(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda = f", CUDA {torch.version.cuda}" if names else ""
    return " + ".join(names) + cuda if names else "none"
