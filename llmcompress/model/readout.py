"""What turns the output of a block into logits, found by watching a forward pass; and the states between blocks.

B = sequences, T = tokens, D = hidden size, N = tokens of all sequences, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.model.skeleton import HIDDEN_KEYWORD, find_blocks
from llmcompress.modules.dynamic_exit import readings

SAME_TOKENS = 0.99
"""Share of equal predictions at which a readout counts as found: sums in another order may break ties otherwise."""


@contextmanager
def watching(model: PreTrainedModel, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """During forwards, show the state (N×D) before every block, with its index, and the one behind the last block."""
    blocks = [block for _, block in find_blocks(model)]

    def before(index: int) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(index, _rows(kwargs[HIDDEN_KEYWORD] if HIDDEN_KEYWORD in kwargs else args[0]))

        return note

    def behind(_: nn.Module, __: object, output: Any) -> None:
        see(len(blocks), _rows(output if isinstance(output, Tensor) else output[0]))

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
        hooks.callback(blocks[-1].register_forward_hook(behind).remove)
        yield


@torch.no_grad()
def readout_of(model: PreTrainedModel, ids_BT: Tensor) -> tuple[str, ...]:
    """Names of the modules that turn the last block's output into logits, in the order in which they run.

    Found by watching a forward pass, and checked: alone they must predict the same tokens.

    Raises: CompressError when they do not.
    """
    final: list[Tensor] = []
    ran: list[str] = []
    blocks = len(find_blocks(model))

    def see(index: int, state_ND: Tensor) -> None:
        if index == blocks:
            final.append(state_ND)

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: object) -> None:
            if final and not any(name.startswith(f"{other}.") for other in ran):
                ran.append(name)

        return note

    with watching(model, see), ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(watch(name)).remove)
        logits_NV = _rows(model(input_ids=ids_BT, use_cache=False).logits)
    tokens_N = readings([model.get_submodule(name) for name in ran], final[0])[1]
    same = float((tokens_N == logits_NV.argmax(-1)).float().mean())
    if same < SAME_TOKENS:
        raise CompressError(
            "dynamic.readout",
            f"{type(model).__name__} cannot compute logits from an intermediate block's output",
            where=", ".join(ran),
            fix="use layer_skip or activation_sparsity",
        )
    return tuple(ran)


def _rows(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD.detach().reshape(-1, hidden_BTD.shape[-1])
