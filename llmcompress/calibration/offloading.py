"""Weight offloading: weights that are not in use stay in memory, or in memory-mapped files."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.loading.mapped import MappedWeights, put_weights
from llmcompress.model.skeleton import find_blocks


class WeightStore(Protocol):
    """Parts of a model are called by their full names: blocks, and what stands outside of them."""

    def leave(self, name: str, module: nn.Module) -> None:
        """The block is not in use any more: offload its weights."""

    def moved(self, name: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """A block was changed and saved; from now on its weights come from `read`."""

    def running(self, model: PreTrainedModel, device: torch.device) -> AbstractContextManager[None]:
        """While this lasts, the model as a whole can be run on the device, in float32."""

    def require_memory(self, what: str) -> None:
        """Raises: CompressError when the weights are not in memory."""


class InMemory:
    """All weights in float32 in the computer's memory."""

    def leave(self, name: str, module: nn.Module) -> None:
        """Move it back from the device."""
        module.to("cpu")
        give_back_freed_memory()

    def moved(self, name: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """It is here already."""

    @contextmanager
    def running(self, model: PreTrainedModel, device: torch.device) -> Iterator[None]:
        """All of it on the device at once."""
        model.to(device)
        try:
            yield
        finally:
            model.to("cpu")
            give_back_freed_memory()

    def require_memory(self, what: str) -> None:
        """Always true."""


class OnDisk:
    """Weights in files: the checkpoint's own, then those that the run keeps of finished blocks.

    A block takes memory from when it is used until it leaves, so the most that is taken does not grow with the model.
    """

    def __init__(self, weights: MappedWeights) -> None:
        self._weights = weights
        self._kept: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
        _keep_no_large_memory()

    def leave(self, name: str, module: nn.Module) -> None:
        """Fresh maps of its files take the place of whatever was read or computed."""
        with torch.inference_mode(False), torch.no_grad():  # what is offloaded must serve outside of an evaluation too
            module.to("cpu")
            if name in self._kept:
                module.load_state_dict(self._kept[name](), strict=True, assign=True)
            else:
                put_weights(module, self._weights, name)
        give_back_freed_memory()

    def moved(self, name: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """It is mapped from another file now."""
        self._kept[name] = read

    @contextmanager
    def running(self, model: PreTrainedModel, device: torch.device) -> Iterator[None]:
        """Every part is read just before it runs and dropped right after."""
        blocks = dict(find_blocks(model))
        outside = dict(_outside(model, blocks))
        with ExitStack() as undo:
            for name, block in blocks.items():
                undo.callback(block.register_forward_pre_hook(lambda part, _: _arrive(part, device)).remove)
                undo.callback(block.register_forward_hook(partial(self._after_block, name)).remove)
            for name, module in outside.items():
                _move_buffers(module, device)
                undo.callback(_move_buffers, module, torch.device("cpu"))
                undo.callback(module.register_forward_pre_hook(lambda part, _: _read(part, device)).remove)
                undo.callback(module.register_forward_hook(partial(self._after_module, name)).remove)
            yield

    def require_memory(self, what: str) -> None:
        """Never true."""
        raise CompressError(
            "memory.needed",
            f"{what} needs the whole model in memory, but this run offloads its weights to disk",
            fix="set offload to never on a machine with enough memory, or remove the pass",
        )

    def _after_block(self, name: str, block: nn.Module, *_: Any) -> None:
        self.leave(name, block)

    def _after_module(self, name: str, module: nn.Module, *_: Any) -> None:
        with torch.inference_mode(False):
            for leaf, parameter in module.named_parameters(recurse=False):
                # .data keeps the parameter itself: a head that is the embedding stays the embedding
                parameter.data = self._weights[f"{name}.{leaf}" if name else leaf]


_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def _keep_no_large_memory() -> None:
    """From now on glibc gives back at once whatever of a megabyte or more is freed, in the whole process.

    By itself it soon keeps pieces of up to 32 MB, between which later ones do not fit: the most that is resident then
    grows from block to block.
    """
    _ask_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def give_back_freed_memory() -> None:
    """Whole pages between pieces that are in use, which glibc keeps for later: they count as the process's memory, and
    grow from block to block where later pieces do not fit."""
    _ask_glibc("malloc_trim", 0)


def _ask_glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


def _outside(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module with tensors of its own that is in no block."""
    inside = {part for block in blocks.values() for part in block.modules()}
    for name, module in model.named_modules():
        if module not in inside and (module._parameters or module._buffers):
            yield name, module


def _arrive(block: nn.Module, device: torch.device) -> None:
    with torch.inference_mode(False), torch.no_grad():
        block.to(device, torch.float32)


def _read(module: nn.Module, device: torch.device) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device, torch.float32)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for leaf, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[leaf] = buffer.to(device)
