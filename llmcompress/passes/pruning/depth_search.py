"""The model's perplexity without some blocks, for many choices of blocks: what choices share is computed once.

B = sequences of a batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.skeleton import BlockCall, Recorder, find_blocks, passing_on, recorders
from llmcompress.numerics.loss import next_token_loss

Show = Callable[[float], None]
"""Told which fraction of the work is done."""

_HEAD = 4
"""What the head and the loss cost, in runs of a block: for the progress alone."""


@torch.no_grad()
def perplexities_without(whole: WholeModel, candidates: Sequence[Collection[int]], show: Show) -> list[float]:
    """The model's perplexity on the calibration windows, each time with some blocks skipped; it stays as it is.

    The states in front of the first block that only one candidate lacks are those of the candidates before it: they
    are carried along, batch by batch, so half of all blocks run, and no more than one batch of states is kept.

    Raises: CompressError when it is not a number: the model overflows.
    """
    common = set(candidates[0]).intersection(*candidates)
    blocks = len(whole.map.blocks)
    firsts = [min(set(gone) - common, default=blocks) for gone in candidates]
    order = sorted(range(len(candidates)), key=firsts.__getitem__)
    left = [index for index in range(blocks) if index not in common]
    totals, tokens = [0.0] * len(candidates), 0
    runs = sum(block < max(firsts) for block in left)
    for at, gone in zip(firsts, candidates, strict=True):
        runs += _HEAD + sum(block >= at and block not in gone for block in left)
    steps = _Steps(show, len(whole.context.windows_NT) * runs)
    with whole.resident() as model, _without_blocks(model, whole.context.windows_NT) as bench:
        for ids_BT in whole.batches():
            count = ids_BT[:, 1:].numel()
            tokens += count
            hidden_BTD, at, calls = bench.start(ids_BT)
            for index in order:
                ahead = [block for block in left if at <= block < firsts[index]]
                hidden_BTD, at = bench.run(ahead, calls, hidden_BTD), firsts[index]
                behind = [block for block in left if block >= at and block not in candidates[index]]
                last_BTD = bench.run(behind, calls, hidden_BTD)
                totals[index] += float(bench.loss(ids_BT, last_BTD)) * count
                steps.take(len(ids_BT) * (len(ahead) + len(behind) + _HEAD))
    if not all(map(math.isfinite, totals)):
        raise CompressError(
            "numerics.not-finite",
            "the model computes NaN or Inf on the calibration data",
            fix="check the checkpoint with a plain forward pass; try another calibration text",
        )
    return [math.exp(min(total / max(tokens, 1), 80.0)) for total in totals]


class _Bench:
    """A model whose blocks run one by one, and what stands before and behind them."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], standing: Sequence[Recorder]) -> None:
        self._model, self._blocks, self._standing = model, blocks, standing

    def start(self, ids_BT: Tensor) -> tuple[Tensor, int, list[BlockCall]]:
        """What the first block is given, its index, and how every block is called."""
        self._model.base_model(input_ids=ids_BT, use_cache=False)
        hidden_BTD, calls = self._standing[0].hidden, [each.call for each in self._standing]
        assert hidden_BTD is not None
        return hidden_BTD, 0, [call for call in calls if call is not None]

    def run(self, blocks: Sequence[int], calls: Sequence[BlockCall], hidden_BTD: Tensor) -> Tensor:
        """These blocks, one after the other."""
        for index in blocks:
            hidden_BTD = calls[index].run(self._blocks[index], hidden_BTD)
        return hidden_BTD

    def loss(self, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Of the model whose last block gives these states."""
        with passing_on(self._standing[-1], hidden_BTD):
            return next_token_loss(self._model(input_ids=ids_BT, use_cache=False).logits, ids_BT)


@contextmanager
def _without_blocks(model: PreTrainedModel, windows_NT: Tensor) -> Iterator[_Bench]:
    named = find_blocks(model)
    with recorders(model, named) as standing:
        if len(windows_NT):
            device = next(model.parameters()).device
            model.base_model(input_ids=windows_NT[:1, :2].to(device), use_cache=False)  # see `recorders`
        yield _Bench(model, [block for _, block in named], standing)


class _Steps:
    """Counts runs of blocks and tells which fraction of all is done."""

    def __init__(self, show: Show, total: int) -> None:
        self._show, self._total, self._done = show, total, 0

    def take(self, count: int) -> None:
        self._done += count
        self._show(min(self._done / max(self._total, 1), 1.0))
