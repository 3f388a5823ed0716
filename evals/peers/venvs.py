"""Scratch environments for other projects' tools, and running a script of this folder inside one.

A peer pins other versions than we do, so it never shares our environment: `run_in("llm-compressor", ...)` makes a
virtual environment on first use (minutes, network) and gives back what the script printed as JSON on its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS: Mapping[str, Sequence[Sequence[str]]] = {
    "llm-compressor": (
        ("torch==2.13.0",),
        ("llmcompressor==0.14.0.1", "transformers>=5.15,<=5.17", "compressed-tensors==0.19.0"),
    ),
    "gptqmodel": (
        ("torch==2.13.0",),
        ("torch==2.13.0", "transformers==5.23.0", "optimum==2.3.0", "gptqmodel==7.6.0", "datasets"),
    ),
    "modelopt": (
        ("torch==2.13.0",),
        ("torch==2.13.0", "transformers==4.57.6", "nvidia-modelopt==0.47.0", "accelerate"),
    ),
    "auto-round": (("torch==2.13.0",), ("torch==2.13.0", "transformers==5.23.0", "auto-round==0.16.1")),
}
"""Name → what to install, step by step: torch first, or another package chooses its build."""


def run_in(peer: str, script: str, arguments: Sequence[str], *, folder: Path, threads: int = 1) -> dict[str, Any]:
    """Run `evals/peers/SCRIPT` in the peer's environment below `folder`; the JSON on its last line of output.

    Raises: RuntimeError with the end of its output when it fails.
    """
    python = environment(peer, folder.resolve())
    command = [str(python), str(Path(__file__).resolve().parent / script), *arguments]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # GPTQModel wants two workers and finds one on a machine of two cores
    quiet["GPTQMODEL_CPU_WORKERS"] = str(max(2, threads))
    with tempfile.TemporaryDirectory() as here:  # some leave logs where they are started
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet, cwd=here)
    if done.returncode:
        raise RuntimeError(f"{peer} {script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def environment(peer: str, folder: Path) -> Path:
    """The interpreter of the peer's environment; made when it does not exist or was left half made."""
    home = folder / peer
    python, finished = home / "bin" / "python", home / "finished"
    if not finished.exists():
        venv.create(home, with_pip=True, clear=True)
        for packages in PEERS[peer]:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        finished.touch()
    return python
