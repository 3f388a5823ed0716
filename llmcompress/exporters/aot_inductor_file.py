"""The tensors beside a compiled program: written under the names that it asks for, and read back to compare."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmcompress.exporters.aot_inductor_graph import PackedCodes, Program
from llmcompress.modules.quant_linear import quantized_linears
from llmcompress.numerics.quantized import QuantizedTensor
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
    """A row for every coded matrix and for every other tensor of the file; the model's linears are packed."""
    rows, seen, tables = list[ReadBack](), set[str](), quantized_linears(model)
    with safe_open(folder / TENSORS, "pt") as file:
        names = set(file.keys())
        for site, module in model.named_modules():
            packed = isinstance(module, PackedCodes)
            own = [name for name in names if name.startswith(f"{PREFIX}{site}.")] if packed or site in tables else []
            found = {name.rpartition(".")[2]: file.get_tensor(name) for name in own}
            if own and isinstance(module, PackedCodes):
                codes = module.unpacked(found.pop("codes"))
                rows.append(_codes(site, f"{module.bits} bits", codes, module.leaf.tensor, module, found))
            elif own:
                codes = found.pop("codes_OI")
                rows.append(_codes(site, "int8", codes, tables[site].quantized, module, found))
            seen |= set(own)
        wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name in sorted(names - seen):
            stored, expected = file.get_tensor(name), wanted[name.removeprefix(PREFIX)]
            rows.append(_plain(name.removeprefix(PREFIX), stored, expected))
    return rows


def _codes(
    site: str, kind: str, codes: Tensor, tensor: QuantizedTensor, module: nn.Module, found: dict[str, Tensor]
) -> ReadBack:
    """`found`: what else the file has of it, by last name."""
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
