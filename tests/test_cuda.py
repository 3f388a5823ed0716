"""The same code on CUDA: every pass ends where it ends on the CPU. Without a GPU on a pretended one (device.cpp)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretended_cuda import build
from tests.tiny_folder import write_tiny_llama

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "tiny").glob("*.yaml"))
QUICK = [
    "awq",
    "bonsai",
    "error-propagation",
    "gates",
    "gptq",
    "gptq:always",
    "kv-cache",
    "learned-rounding",
    "mixed-precision",
    "modegpt",
    "recover",
    "reorder",
    "rotation-learned",
    "slicegpt",
    "slicegpt-global",
    "sparsegpt-gptq",
    "svd-llm",
    "w8a8-static",
    "width-taylor",
]
"""One of every way in which code gets to the device; all the others are slow tests."""
REAL = torch.cuda.is_available()

Compare = Callable[[list[str]], dict[str, dict[str, Any]]]

pytestmark = pytest.mark.skipif(
    not REAL and (shutil.which("g++") is None or torch.version.cuda is not None), reason="neither a GPU nor a compiler"
)


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Compare:
    folder = tmp_path_factory.mktemp("cuda")
    library = "-" if REAL else str(build(folder))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = write_tiny_llama(folder / "tiny", **sizes)

    def run(recipes: list[str]) -> dict[str, dict[str, Any]]:
        paths = [f"configs/tiny/{name.partition(':')[0]}.yaml{''.join(name.partition(':')[1:])}" for name in recipes]
        done = subprocess.run(
            [
                sys.executable,
                "tests/pretended_cuda/program.py",
                library,
                str(model),
                str(folder / f"out{len(recipes)}"),
                *paths,
            ],
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
        assert row["alike"], f"{name}: other tensors"
        assert here == pytest.approx(there, rel=1e-2 if REAL else 1e-3), name
        # kernels of a real device sum in another order: codes next to a boundary go the other way
        assert REAL or row["other"] <= 0.01 * row["values"], f"{name}: {row['other']} of {row['values']} values differ"


def test_results_on_cuda_are_those_on_the_cpu(compare):
    found = compare(QUICK)
    assert list(found) == QUICK
    agree(found)


@pytest.mark.slow
def test_every_recipe_on_cuda(compare):
    found = compare(RECIPES)
    assert list(found) == RECIPES
    agree(found)
