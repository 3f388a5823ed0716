"""States and predictions that dynamic inference measures on calibration text: the hidden state before every block, and
its logits.

B = sequences, T = tokens, D = hidden size, N = tokens of all sequences, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.skeleton import HIDDEN_KEYWORD, find_blocks
from llmcompress.modules.dynamic import DynamicBlock, tallied
from llmcompress.modules.dynamic_exit import LOGITS_AT_ONCE, logits_of, readings
from llmcompress.records.rows import SiteReport

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


def states_at(whole: WholeModel, model: PreTrainedModel, indices: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Run the model over the calibration batches; per batch the states before these blocks (last + 1: behind all)."""
    states: dict[int, Tensor] = {}

    def see(index: int, state_ND: Tensor) -> None:
        if index in indices:
            states[index] = state_ND

    with watching(model, see):
        for ids_BT in whole.batches():
            model.base_model(input_ids=ids_BT, use_cache=False)
            yield states


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


def divergence(read: Sequence[nn.Module], final_ND: Tensor, here_ND: Tensor) -> Tensor:
    """KL divergence in nats of the prediction read off `here_ND` from the one read off `final_ND`, token by token."""
    found = []
    width = getattr(read[-1], "out_features", LOGITS_AT_ONCE)
    pieces = max(1, LOGITS_AT_ONCE // width)
    for final_KD, here_KD in zip(torch.split(final_ND, pieces), torch.split(here_ND, pieces), strict=True):
        wanted_KV, given_KV = (logits_of(read, state_KD).log_softmax(-1) for state_KD in (final_KD, here_KD))
        found.append(functional.kl_div(given_KV, wanted_KV, reduction="none", log_target=True).sum(-1))
    return torch.cat(found)


def put_around(model: PreTrainedModel, wrappers: Mapping[int, DynamicBlock]) -> None:
    """Put a wrapper around each block with such an index, and let all find what they need of the model."""
    for index, (name, block) in enumerate(find_blocks(model)):
        if index in wrappers:
            wrapper = wrappers[index]
            wrapper.to(next(block.parameters()).device).take(block)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, wrapper.train(block.training))
    for wrapper in wrappers.values():
        wrapper.connect(model)


def measured(
    whole: WholeModel, model: PreTrainedModel, names: Sequence[str], algorithm: str, threshold: float
) -> list[SiteReport]:
    """What the finished model runs on the calibration text, the effect of earlier skips on later tokens included."""
    with tallied(model) as counts:
        for ids_BT in whole.batches():
            model.base_model(input_ids=ids_BT, use_cache=False)
    tokens = whole.context.windows_NT.numel()
    return [
        SiteReport(site=name, algorithm=algorithm, score=threshold, active=counts[name].share, tokens=tokens)
        for name in names
    ]


def _rows(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD.detach().reshape(-1, hidden_BTD.shape[-1])
