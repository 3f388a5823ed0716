"""The same code on CUDA: every pass ends where it ends on the CPU. Without a GPU on a pretended one (device.cpp), a
quarter of the recipes each time.

Fails, instead of being skipped, where there is neither a GPU nor a compiler: skipped it would prove nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmcompress.passes.base import PASSES
from tests.pretended_cuda import build
from tests.tiny_folder import write_tiny_llama

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny"
RECIPES = sorted(path.stem for path in TINY.glob("*.yaml"))
REAL = torch.cuda.is_available()
ROUNDED_AGAIN = {"qlora": 0.05}
"""Trained weights are rounded to codes, two in a byte: other sums on the way move some over a boundary."""

Compare = Callable[[list[str]], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return "-" if REAL else str(build(tmp_path_factory.mktemp("device")))


@pytest.fixture
def compare(library: str, tmp_path: Path) -> Compare:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 256}
    model = write_tiny_llama(tmp_path / "tiny", **sizes)

    def run(recipes: list[str]) -> dict[str, dict[str, Any]]:
        program = ["tests/pretended_cuda/program.py", library, str(model), str(tmp_path / "out"), *recipes]
        done = subprocess.run(
            [sys.executable, *program],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"recipe"')]
        return {row.pop("recipe"): row for row in rows}

    return run


def agree(found: dict[str, dict[str, Any]]) -> None:
    failed = {name: row["failed"] for name, row in found.items() if "failed" in row}
    assert not failed
    for name, row in found.items():
        there, here = row["perplexity"]
        assert here == pytest.approx(there, rel=1e-2 if REAL else 1e-3), name
        # kernels of a real device sum in another order: codes next to a boundary go the other way
        share = ROUNDED_AGAIN.get(name, 0.01)
        assert REAL or row["other"] <= share * row["values"], f"{name}: {row['other']} of {row['values']} values differ"
        idle, busy = row["work"]
        assert idle == 0 < busy, f"{name}: the device worked {idle} times for the CPU, {busy} times for itself"


def test_results_on_cuda_are_those_on_the_cpu(compare, selection):
    asked = [*(RECIPES if REAL else selection.quarter(RECIPES)), "gptq:always"]
    found = compare(asked)
    assert list(found) == asked
    agree(found)


def test_the_recipes_together_use_every_pass():
    used = {name for recipe in RECIPES for name in names(yaml.safe_load((TINY / f"{recipe}.yaml").read_text()))}
    assert set(PASSES) <= used


def names(part: Any) -> set[str]:
    """Every key and every text of a recipe."""
    if isinstance(part, dict):
        return {str(key) for key in part}.union(*(names(value) for value in part.values()))
    return set().union(*(names(each) for each in part)) if isinstance(part, list) else {str(part)}
