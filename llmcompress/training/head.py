"""Logits on demand: the inputs of the output head are kept, and logits are computed for a few positions at a time.

B = samples, T = tokens, R = rows (positions of all samples, flattened), D = width of the head's inputs, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.numerics import loss
from llmcompress.training.data.batch import Batch

Change = Callable[[Tensor], Tensor]
_PROBED = 8
"""Tokens on which the head is compared with the model's own logits."""

_NEARLY_ALL = 0.8
"""Of the positions: where fewer predict something, as in prompts and padding, logits of the others are not computed."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at every position of a batch."""

    values_RX: Tensor
    """From which `logits` computes: the head's inputs, or the logits themselves."""
    logits: Change
    """Rows of `values_RX` → float32 logits R×V."""

    def with_values(self, values_RX: Tensor) -> Predictions:
        """Of other inputs of the head."""
        return Predictions(values_RX, self.logits)

    def cut(self, vocabulary: int | None) -> Predictions:
        """Without the logits of padding tokens behind that number; None: all."""
        if vocabulary is None:
            return self
        return Predictions(self.values_RX, lambda values_RX: self.logits(values_RX)[:, :vocabulary])


@dataclass(frozen=True)
class Head:
    """The output embedding of a model, and what the model does to its result (a scale, soft-capping)."""

    module: nn.Module
    change: Change

    def logits(self, values_RD: Tensor) -> Tensor:
        """R×V in float32."""
        logits_RV: Tensor = self.change(self.module(values_RD))
        return logits_RV.float()


def rows_at_once(vocabulary: int) -> int:
    """How many rows may have their logits at once."""
    return max(1, loss.LOGITS_BYTES // (4 * vocabulary))


def needs_head(batch: Batch, vocabulary: int) -> bool:
    """Whether logits are better computed on demand: all at once they are too large, or many of them not needed."""
    rows = batch.ids_BT.numel()
    return rows > rows_at_once(vocabulary) or batch.predicted < _NEARLY_ALL * rows


def predictions(model: PreTrainedModel, batch: Batch, head: Head | None) -> Predictions:
    """Of a batch: with a `head` the model computes the logits of the last position alone."""
    if head is None:
        return Predictions(_forward(model, batch.ids_BT, batch.attention_BT).flatten(0, 1), torch.Tensor.float)
    with _inputs_of(head.module) as inputs:
        _forward(model, batch.ids_BT, batch.attention_BT)
    return Predictions(inputs[0].flatten(0, 1), head.logits)


@torch.no_grad()
def find_head(model: PreTrainedModel, ids_BT: Tensor) -> Head | None:
    """The head, if its output on a few tokens is what the model answers; None when no known change explains the model.

    Tried are nothing, and a scale, its reciprocal and soft-capping with each number that the config holds: those are
    the changes that models make to their logits (Cohere, Granite, Gemma 2).
    """
    module = model.get_output_embeddings()
    if module is None:
        return None
    ids_BT = ids_BT[:1, :_PROBED]
    with torch.random.fork_rng([ids_BT.device] if ids_BT.device.type == "cuda" else []):
        with _inputs_of(module, shorten=False) as inputs:
            wanted = _forward(model, ids_BT, None)
        if len(inputs) != 1 or inputs[0].shape[:2] != wanted.shape[:2]:
            return None
        plain = module(inputs[0])
    if plain.shape != wanted.shape:
        return None
    tolerance = 1e-5 * float(wanted.float().abs().max())
    for change in _changes(model.config.get_text_config()):
        if torch.allclose(change(plain).float(), wanted.float(), rtol=0, atol=tolerance):
            return Head(module, change)
    return None


def _changes(config: PretrainedConfig) -> Iterator[Change]:
    yield _scaled(1.0)
    numbers = {float(value) for value in config.to_dict().values() if type(value) in (int, float) and value > 0}
    for number in sorted(numbers):
        yield from (_scaled(number), _scaled(1 / number), _capped(number))


def _scaled(factor: float) -> Change:
    return lambda logits: logits if factor == 1 else logits * factor


def _capped(cap: float) -> Change:
    return lambda logits: torch.tanh(logits / cap) * cap


def _forward(model: PreTrainedModel, ids_BT: Tensor, attention_BT: Tensor | None) -> Tensor:
    padding = {} if attention_BT is None else {"attention_mask": attention_BT}
    logits: Tensor = model(input_ids=ids_BT, use_cache=False, **padding).logits
    return logits


@contextmanager
def _inputs_of(module: nn.Module, *, shorten: bool = True) -> Iterator[list[Tensor]]:
    """What the module is given while this lasts; with `shorten` it computes the last position alone."""
    inputs: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        inputs.append(args[0])
        return (args[0][:, -1:], *args[1:]) if shorten else None

    handle = module.register_forward_pre_hook(take)
    try:
        yield inputs
    finally:
        handle.remove()
