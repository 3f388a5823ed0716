"""The tensors beside a compiled program: written under the names that it asks for, and read back to compare."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmcompress.exporters.aot_inductor_graph import PackedLinear, Program
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.records.export_report import ReadBack

PROGRAM, TENSORS, DESCRIPTION = "model.pt2", "model.safetensors", "aot_inductor.json"
PREFIX = "model."
"""In front of every name: the model is one part of what is compiled."""


def write_tensors(program: Program, folder: Path) -> int:
    """Write them; the bytes of all of them."""
    held = {name: each.detach().contiguous() for name, each in program.tensors.items()}
    save_file(_unshared(held), folder / TENSORS, metadata={"format": "pt"})
    return sum(each.nbytes for each in held.values())


@torch.no_grad()
def read_back(model: nn.Module, folder: Path) -> list[ReadBack]:
    """A row for every coded matrix and for every other tensor of the file; the model's small codes are packed."""
    rows, seen = list[ReadBack](), set[str]()
    with safe_open(folder / TENSORS, "pt") as file:
        names = set(file.keys())
        for site, module in model.named_modules():
            own = [name for name in names if name.startswith(f"{PREFIX}{site}.")]
            if own and isinstance(module, PackedLinear | QuantLinear):
                rows.append(_codes(site, module, {name.rpartition(".")[2]: file.get_tensor(name) for name in own}))
                seen |= set(own)
        wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name in sorted(names - seen):
            found, expected = file.get_tensor(name), wanted[name.removeprefix(PREFIX)]
            rows.append(_plain(name.removeprefix(PREFIX), found, expected))
    return rows


def _codes(site: str, module: PackedLinear | QuantLinear, found: dict[str, Tensor]) -> ReadBack:
    """`found`: what the file has of it, by last name. Tables are int8 as they are."""
    if isinstance(module, PackedLinear):
        tensor, kind, codes = module.leaf.tensor, f"{module.bits} bits", module.unpacked(found.pop("codes"))
    else:
        tensor, kind, codes = module.quantized, "int8", found.pop("codes_OI")
    own = dict(module.named_buffers()) | dict(module.named_parameters())
    return ReadBack(
        source=site,
        stored_as=kind,
        values=tensor.weights,
        codes_differing=int((codes != tensor.codes).sum()),
        scales_differing=sum(int((value != own[name]).sum()) for name, value in found.items()),
        rounding_in_steps=0.0,
    )


def _plain(name: str, found: Tensor, expected: Tensor) -> ReadBack:
    kind, same = str(found.dtype).removeprefix("torch."), found.shape == expected.shape
    differing = int((found != expected).sum()) if same else expected.numel()
    return ReadBack(source=name, stored_as=kind, values=expected.numel(), weights_differing=differing)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors holds no two names of one memory: the second one becomes a copy."""
    seen, found = set[int](), dict[str, Tensor]()
    for name, each in tensors.items():
        found[name] = each.clone() if each.data_ptr() in seen else each
        seen.add(each.data_ptr())
    return found
