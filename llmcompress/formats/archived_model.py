"""A model while its archived tensors are loaded: every tensor of the file is a row of bytes, under its own name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.errors import CompressError
from llmcompress.formats import archive


@dataclass(frozen=True)
class Waiting:
    """A tensor of the model whose bytes are loaded in its place."""

    name: str
    dtype: torch.dtype
    """What the model computes in there."""
    shape: torch.Size
    requires_grad: bool


def enter_archive(model: nn.Module, sizes: Mapping[str, int]) -> list[Waiting]:
    """Put rows of bytes, of these lengths, into the places of the named tensors; for `leave_archive` what was there.

    Raises: CompressError when the model has no such tensor.
    """
    waiting = []
    for name, size in sizes.items():
        tensor = _tensor(model, name)
        _put(model, tensor, torch.zeros(size, dtype=torch.uint8, device=tensor.device))
        waiting.append(Waiting(name, tensor.dtype, tensor.shape, tensor.requires_grad))
    return waiting


def leave_archive(model: nn.Module, waiting: list[Waiting]) -> None:
    """Unpack what was loaded, in place, in the dtypes that the model computes in; tied tensors stay tied.

    Raises: CompressError when bytes are damaged.
    """
    for each in waiting:
        loaded = _tensor(model, each.name)
        try:
            tensor = archive.unpack(loaded, tuple(each.shape))
        except archive.BadArchive as problem:
            raise _damaged(each.name, str(problem)) from problem
        wanted = each.dtype if tensor.is_floating_point() else tensor.dtype
        _put(model, loaded, tensor.to(wanted).to(loaded.device), requires_grad=each.requires_grad)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), leaf)
    except AttributeError as problem:
        raise _damaged(name, "the model has no such tensor") from problem
    assert isinstance(found, Tensor)
    return found


def _put(model: nn.Module, old: Tensor, new: Tensor, *, requires_grad: bool = False) -> None:
    """In all places that hold the old one: version 4 of transformers ties before it loads, 5 afterwards."""
    parameter = nn.Parameter(new, requires_grad=requires_grad)
    for module in model.modules():
        for leaf in [leaf for leaf, each in module._parameters.items() if each is old]:
            module._parameters[leaf] = parameter
        for leaf in [leaf for leaf, each in module._buffers.items() if each is old]:
            module._buffers[leaf] = new


def _damaged(name: str, why: str) -> CompressError:
    return CompressError(
        "archive.damaged", f"an archived tensor cannot be unpacked: {why}", where=name, fix="get the whole folder again"
    )
