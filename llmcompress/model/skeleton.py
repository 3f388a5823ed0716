"""Runs a model without its blocks: each is replaced by a recorder that notes the arguments the block would get."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.model.random_weights import materialise
from llmcompress.modules.cache_names import CACHE_NAMES

HIDDEN_KEYWORD = "hidden_states"
"""Names of a block's KV cache argument in transformers."""


@dataclass(frozen=True)
class BlockCall:
    """Everything one block is called with except its hidden state: masks, rotary tables, positions; no caches."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_keyword: bool = False

    def run(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """The block's output hidden state, always B×T×D (of another width where the basis changes).

        Newer transformers blocks return a tensor, whose `[0]` would silently be the first sequence of the batch.
        """
        if self.hidden_by_keyword:
            output = block(*self.args, **{HIDDEN_KEYWORD: hidden_BTD}, **self.kwargs)
        else:
            output = block(hidden_BTD, *self.args, **self.kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
        assert isinstance(hidden, Tensor) and hidden.shape[:-1] == hidden_BTD.shape[:-1], "a block must keep all tokens"
        return hidden

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> BlockCall:
        """The same call with every tensor in it changed: moved to a device, for instance."""
        return replace(
            self,
            args=_with_tensors(self.args, change),
            kwargs={k: _with_tensors(v, change) for k, v in self.kwargs.items()},
        )


@dataclass(frozen=True)
class Recording:
    """The inputs and arguments of a model's blocks for one batch."""

    hidden: Tensor
    """B×T×D, the first block's input."""
    calls: list[BlockCall]
    """One per block, each with that block's own arguments."""


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Full names and modules of the decoder blocks: the shallowest ModuleList with one entry per hidden layer.

    Raises: CompressError when the model has no such list.
    """
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    if not lists:
        raise CompressError(
            "model.no-blocks",
            f"no list of {layers} blocks was found in {type(model).__name__}",
            where=f"num_hidden_layers: {layers}",
            fix="only decoder models that keep their blocks in one ModuleList can be compressed",
        )
    _, name, blocks = min(lists, key=lambda found: found[0])
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


class Recorder(nn.Module):
    """Replaces a block; returns its input hidden state and forwards the block's attributes."""

    def __init__(self, block: nn.Module, form: _Form) -> None:
        super().__init__()
        # Not as submodules: the recorder must not appear to own the block's weights.
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "form", form)
        self.hidden: Tensor | None = None
        self.call: BlockCall | None = None

    def __getattr__(self, name: str) -> Any:
        # Model code reads such things as `layer.attention_type` between the blocks.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call; give the hidden state back as the block would return its own."""
        by_keyword = HIDDEN_KEYWORD in kwargs
        hidden = kwargs.pop(HIDDEN_KEYWORD) if by_keyword else args[0]
        rest = args if by_keyword else args[1:]
        self.hidden = hidden
        self.call = BlockCall(
            tuple(_without_cache("", value) for value in rest),
            {name: _without_cache(name, value) for name, value in kwargs.items()},
            by_keyword,
        )
        return self.form.of(self.block, self.call, hidden)


class _Form:
    """How the blocks of this model return their hidden state: bare, or first in a tuple of a certain length.

    Learned by really running the first block once (a random copy, if its weights are not loaded): nothing in a
    model says it.
    """

    def __init__(self) -> None:
        self.length: int | None = None
        self.known = False

    def of(self, block: nn.Module, call: BlockCall, hidden: Tensor) -> Any:
        if not self.known:
            arguments = {HIDDEN_KEYWORD: hidden} if call.hidden_by_keyword else {}
            positional = call.args if call.hidden_by_keyword else (hidden, *call.args)
            if any(parameter.is_meta for parameter in block.parameters()):
                block = copy.deepcopy(block)
                materialise(block)
            with torch.no_grad(), _without_hooks(block):
                output = block(*positional, **arguments, **call.kwargs)
            self.length = None if isinstance(output, Tensor) else len(output)
            self.known = True
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))


@contextmanager
def _without_hooks(block: nn.Module) -> Iterator[None]:
    """Hooks inside the block do not see this run: it is on no data, and not on the device they may wait on.

    Those of the block itself stay: they bring its weights.
    """
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in block.modules() if part is not block]
    for part, _, _ in hooks:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, behind in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, behind


@contextmanager
def recorders(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[list[Recorder]]:
    """Put a recorder in the place of every block; the blocks are back afterwards, also after an exception.

    The very first call of the model runs the first block once, to learn how blocks return their hidden state;
    `record` makes that call with two tokens.
    """
    form = _Form()
    standing = [Recorder(block, form) for _, block in blocks]
    try:
        for (name, _), recorder in zip(blocks, standing, strict=True):
            put_module(model, name, recorder)
        yield standing
    finally:
        for name, block in blocks:
            put_module(model, name, block)


@contextmanager
def passing_on(recorder: Recorder, hidden_BTD: Tensor) -> Iterator[None]:
    """While this lasts, the recorder passes these states on, whatever it is given."""

    def instead(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if HIDDEN_KEYWORD in kwargs:
            return args, {**kwargs, HIDDEN_KEYWORD: hidden_BTD}
        return (hidden_BTD, *args[1:]), kwargs

    handle = recorder.register_forward_pre_hook(instead, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record(model: PreTrainedModel, blocks: Sequence[tuple[str, nn.Module]], input_ids_BT: Tensor) -> Recording:
    """What the blocks of the model would be called with for these tokens; no block runs on them.

    Raises: CompressError when the model does not pass one hidden state from block to block.
    """
    decoder = model.base_model
    with recorders(model, blocks) as standing:
        decoder(input_ids=input_ids_BT[:1, :2], use_cache=False)
        decoder(input_ids=input_ids_BT, use_cache=False)
        hidden = standing[0].hidden
        calls = [recorder.call for recorder in standing]
    if hidden is None or None in calls or hidden.dim() != 3 or hidden.shape[:2] != input_ids_BT.shape:
        raise CompressError(
            "model.other-blocks",
            f"{type(model).__name__} does not run its blocks in sequence on one hidden state per token",
            where=blocks[0][0] if hidden is None else f"{blocks[0][0]}: input of shape {tuple(hidden.shape)}",
            fix="only plain decoder models can be compressed",
        )
    return Recording(hidden, [call for call in calls if call is not None])


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Another module under a full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _without_cache(name: str, value: Any) -> Any:
    if name == "use_cache":
        return False
    return None if name in CACHE_NAMES or hasattr(value, "get_seq_length") else value


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_with_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _with_tensors(item, change) for key, item in value.items()}
    return value
