"""Compress one model with tiny recipes on the CPU and on CUDA; prints a line of JSON for each: how far apart they are.

    python tests/pretended_cuda/program.py LIBRARY MODEL OUT NAME[:always] ...

LIBRARY is what `build` made, or `-` on a machine that has a GPU; a NAME is that of a recipe in configs/tiny, with
`:always` its weights stay on disk.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PRETENDED = None if __name__ != "__main__" or sys.argv[1] == "-" else ctypes.CDLL(sys.argv[1])
"""Loaded before torch, which asks once, while it is imported, whether there is a CUDA device."""

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

for name in ("accelerate", "bitsandbytes", "peft", "transformers.trainer"):
    # those that are installed decide at import whether to look for CUDA's own packages
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)

from llmcompress.pipeline import compress  # noqa: E402
from llmcompress.recipe import read_recipe  # noqa: E402

TEXT = ".quant_state."
"""In the names of what bitsandbytes stores as JSON."""
RECIPES = Path(__file__).parent.parent.parent / "configs" / "tiny"


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


def work_on_device() -> int:
    """Grows whenever the device does something: operators it ran; on a GPU, pieces of memory it gave."""
    if PRETENDED:
        return int(PRETENDED.device_calls())
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def results(model: str, out: Path, recipe: Path, offload: str, device: str) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors that were saved, and the perplexity that was measured on the device."""
    # both with the plain formula for attention: other kernels sum in another order
    with sdpa_kernel(SDPBackend.MATH):
        report = compress(model, read_recipe(recipe), out, device=device, offload=offload).report
    tensors = {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return tensors, report.quality[0].compressed.perplexity


def worked(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """What a function returns, and how much of its work the device did."""
    before = work_on_device()
    return function(*arguments), work_on_device() - before


def compared(model: str, out: Path, recipe: Path, offload: str) -> dict[str, Any]:
    """How far apart the two devices end.

    Raises: ValueError when they do not save the same tensors.
    """
    (there, perplexity_there), idle = worked(results, model, out / "cpu", recipe, offload, "cpu")
    (here, perplexity_here), busy = worked(results, model, out / "cuda", recipe, offload, "cuda")
    kinds = [{name: kind(name, each) for name, each in side.items()} for side in (there, here)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"other tensors: {dict(kinds[0].items() ^ kinds[1].items())}")
    return {
        "values": sum(each.numel() for each in there.values()),
        "other": sum(
            int((each.float() != here[name].float()).sum()) for name, each in there.items() if TEXT not in name
        ),
        "perplexity": [perplexity_there, perplexity_here],
        "work": [idle, busy],
    }


def kind(name: str, tensor: torch.Tensor) -> tuple[object, torch.dtype]:
    """Shape and dtype. Numbers that bitsandbytes writes as text are as long as their digits."""
    return (TEXT if TEXT in name else tensor.shape), tensor.dtype


def main() -> None:
    """One line for each recipe."""
    _, model, out, *asked = sys.argv[1:]
    torch.set_num_threads(1)
    if PRETENDED:
        pretend()
    if not refuses_mixed_operands():
        raise SystemExit("the device takes operands from elsewhere: it would find nothing")
    for each in asked:
        name, _, offload = each.partition(":")
        try:
            found = compared(model, Path(out) / each, RECIPES / f"{name}.yaml", offload or "never")
        except Exception as problem:  # one that fails must not hide the others
            found = {"failed": f"{type(problem).__name__}: {problem}"}
        sys.stdout.write("\n" + json.dumps({"recipe": each, **found}) + "\n")


if __name__ == "__main__":
    main()
