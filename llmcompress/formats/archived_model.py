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
    places: tuple[tuple[nn.Module, str], ...]
    """Modules that hold it, and what they call it: several of a tied one."""
    dtype: torch.dtype
    """What the model computes in there."""
    shape: torch.Size
    is_parameter: bool

    def put(self, tensor: Tensor) -> None:
        """Hold this one instead."""
        held = nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor
        for module, leaf in self.places:
            (module._parameters if self.is_parameter else module._buffers)[leaf] = held  # type: ignore[assignment]

    def now(self) -> Tensor:
        """What is held."""
        module, leaf = self.places[0]
        found = getattr(module, leaf)
        assert isinstance(found, Tensor)
        return found


def enter_archive(model: nn.Module, sizes: Mapping[str, int]) -> list[Waiting]:
    """Put rows of bytes, of these lengths, into the places of the named tensors; for `leave_archive` what was there.

    Raises: CompressError when the model has no such tensor.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append((module, leaf))
    waiting = []
    for name, size in sizes.items():
        owner, _, leaf = name.rpartition(".")
        try:
            tensor = getattr(model.get_submodule(owner), leaf)
        except AttributeError as problem:
            raise _damaged(name, "the model has no such tensor") from problem
        is_parameter = isinstance(tensor, nn.Parameter)
        each = Waiting(name, tuple(places[id(tensor)]), tensor.dtype, tensor.shape, is_parameter)
        each.put(torch.zeros(size, dtype=torch.uint8, device=tensor.device))
        waiting.append(each)
    return waiting


def leave_archive(waiting: list[Waiting]) -> None:
    """Unpack what was loaded, in place, in the dtypes that the model computes in.

    Raises: CompressError when bytes are damaged.
    """
    for each in waiting:
        bytes_now = each.now()
        try:
            tensor = archive.unpack(bytes_now)
        except archive.BadArchive as problem:
            raise _damaged(each.name, str(problem)) from problem
        except archive.zstandard().ZstdError as problem:
            raise _damaged(each.name, f"zstandard cannot decode it: {problem}") from problem
        if tensor.shape != each.shape:
            raise _damaged(each.name, f"its shape is {list(tensor.shape)}, and the model has {list(each.shape)} there")
        wanted = each.dtype if tensor.is_floating_point() else tensor.dtype
        each.put(tensor.to(wanted).to(bytes_now.device))


def _damaged(name: str, why: str) -> CompressError:
    return CompressError(
        "archive.damaged", f"an archived tensor cannot be unpacked: {why}", where=name, fix="get the whole folder again"
    )
