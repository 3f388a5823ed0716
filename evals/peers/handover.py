"""What scripts inside the peers' environments share: what they are told, how they are timed, what they hand over.

Needs nothing but torch and safetensors, which every peer brings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def arguments(methods: Collection[str]) -> argparse.ArgumentParser:
    """A model folder, a method, integer codes in groups, calibration windows, and where the result goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group", type=int, help="inputs that share a scale; without it a whole row does")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    return parser


def windows_of(chosen: argparse.Namespace) -> torch.Tensor:
    """Calibration token ids, samples × tokens."""
    return load_file(chosen.windows)["windows"]


class Stopwatch:
    """Wall seconds, and CPU seconds of this process, that a `with` block takes."""

    def __enter__(self) -> Stopwatch:
        self.seconds, self.cpu_seconds = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self.seconds, time.process_time() - self.cpu_seconds


def hand_over(
    state: Mapping[str, torch.Tensor],
    chosen: argparse.Namespace,
    taken: Stopwatch,
    packages: Collection[str],
    **more: Any,
) -> None:
    """Write the dense weights, where anybody wants them; print seconds, versions and the rest as one line of JSON."""
    if chosen.out:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, chosen.out)
    versions = {name: version(name) for name in packages}
    found = {"cpu_seconds": taken.cpu_seconds, "seconds": taken.seconds, "versions": versions, **more}
    print(json.dumps(found))
