"""Compress one model with every recipe on the CPU and on CUDA; prints a line of JSON for each: how far apart they are.

    python tests/pretended_cuda/program.py LIBRARY MODEL OUT RECIPE[:always] ...

LIBRARY is what `build` made, or `-` on a machine that has a GPU.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__" and sys.argv[1] != "-":
    ctypes.CDLL(sys.argv[1])  # torch asks once, while it is imported, whether there is a CUDA device

import accelerate  # noqa: F401 - these decide at import whether to look for CUDA's own packages
import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmcompress.pipeline import compress
from llmcompress.recipe import read_recipe


def pretend() -> None:
    """What torch's own Python asks of CUDA's runtime, which is not there."""
    properties = SimpleNamespace(name="pretended", total_memory=8 << 30, major=8, minor=0, multi_processor_count=1)
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (8, 0),
        "mem_get_info": (8 << 30, 8 << 30),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)  # type: ignore[assignment]


def refuses_mixed_operands() -> bool:
    """Whether the device finds what it is there to find."""
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
    except RuntimeError as problem:
        return "same device" in str(problem)
    return False


def results(model: str, out: Path, recipe: Path, offload: str, device: str) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors that were saved, and the perplexity that was measured on the device."""
    # both with the plain formula for attention: other kernels sum in another order
    with sdpa_kernel(SDPBackend.MATH):
        report = compress(model, read_recipe(recipe), out, device=device, offload=offload)
    tensors = {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return tensors, report.quality[0].compressed.perplexity


def compared(model: str, out: Path, recipe: Path, offload: str) -> dict[str, Any]:
    """How far apart the two devices end."""
    there, perplexity_there = results(model, out / "cpu", recipe, offload, "cpu")
    here, perplexity_here = results(model, out / "cuda", recipe, offload, "cuda")
    alike = {name: (each.shape, each.dtype) for name, each in there.items()} == {
        name: (each.shape, each.dtype) for name, each in here.items()
    }
    return {
        "alike": alike,
        "values": sum(each.numel() for each in there.values()),
        "other": sum(int((each.float() != here[name].float()).sum()) for name, each in there.items()) if alike else -1,
        "perplexity": [perplexity_there, perplexity_here],
    }


def main() -> None:
    """One line for each recipe."""
    library, model, out, *recipes = sys.argv[1:]
    torch.set_num_threads(1)
    if library != "-":
        pretend()
    if not refuses_mixed_operands():
        raise SystemExit("the device takes operands from elsewhere: it would find nothing")
    for asked in recipes:
        path, _, offload = asked.partition(":")
        try:
            found = compared(model, Path(out) / asked.replace("/", "_"), Path(path), offload or "never")
        except Exception as problem:  # one that fails must not hide the others
            found = {"failed": f"{type(problem).__name__}: {problem}"}
        sys.stdout.write(
            "\n" + json.dumps({"recipe": Path(path).stem + (f":{offload}" if offload else ""), **found}) + "\n"
        )


if __name__ == "__main__":
    main()
