"""Estimated losses of single changes, to second order, measured in the stream that makes the levels.

N = windows, T = tokens, H = hidden size, O = outputs.

A change of a linear's outputs by e raises the mean divergence per token by about ½ Σ g² e², where g is the gradient of
the loss of a whole window. For linears the sums over tokens of g² and e² are multiplied, output by output; for what
happens to a whole block the products are taken token by token, because a few tokens have states thousands of times
longer than others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.skeleton import find_blocks
from llmcompress.numerics.grid import row_errors
from llmcompress.sensitivity.gradients import GradientObserver, OutputSquares, sweep


class BlockGradients(GradientObserver):
    """The gradient of the loss in the output of every block, N×T×H, in bfloat16 on the CPU."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Tensor]] = {}
        self._now: dict[int, Tensor] = {}

    @override
    @contextmanager
    def attached(self, whole: WholeModel, model: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for index, (_, block) in enumerate(find_blocks(model)):
                self._parts[index] = []
                hooks.callback(block.register_forward_hook(partial(self._watch, index)).remove)
            yield

    def _watch(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(partial(self._now.__setitem__, index))  # type: ignore[no-untyped-call]

    @override
    def collect(self) -> None:
        for index, gradient in self._now.items():
            self._parts[index].append(gradient.detach().to("cpu", torch.bfloat16))
        self._now = {}

    def of_block(self, index: int) -> Tensor:
        """N×T×H."""
        return torch.cat(self._parts[index])


class Sensitivities:
    """One gradient sweep: what every output and every state between blocks is felt in the loss."""

    def __init__(self, whole: WholeModel) -> None:
        names = whole.map.site_names()
        self._outputs, self._blocks = OutputSquares(names), BlockGradients()
        self._windows = len(whole.context.windows_NT)
        sweep(whole, [self._outputs, self._blocks])

    def site_loss(self, site: str, change_OI: Tensor, gram_II: Tensor, rows_O: Tensor | None) -> float:
        """Of a change of that linear's weight; `rows_O`: which of the dense outputs it still has."""
        felt_O = self._outputs.sums[site].double()
        if rows_O is not None:
            felt_O = felt_O[rows_O.to(felt_O.device)]
        # both are sums over all tokens: the mean of one factor times the other, and gradients are those of a mean
        return 0.5 * float(row_errors(change_OI, gram_II).double() @ felt_O) / self._windows**2

    def block_loss(self, index: int, dense: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        """Of other states behind a block than the dense ones, batch by batch."""
        gradient_NTH, total, start = self._blocks.of_block(index), 0.0, 0
        for dense_BTH, other_BTH in zip(dense, other, strict=True):
            here_BTH = gradient_NTH[start : start + len(dense_BTH)].float()
            start += len(dense_BTH)
            total += float((here_BTH * (other_BTH - dense_BTH).float()).sum(-1).double().square().sum())
        predictions = gradient_NTH.shape[1] - 1
        return 0.5 * total * predictions / self._windows
