"""Learning a block's codes: its outputs beside those of the dense model, a few windows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite

_HELD_OUT = 8
"""One of so many parts only chooses between the steps."""
_LEAST = 1e-12
"""A token of zeros counts by its error alone."""
_LOOKS = 8
"""How often in a training the block is measured on the windows kept apart."""
_FEWEST = 4
"""Parts that are needed to hold one out; with fewer all teach and all choose."""
_WARM_UP = 1 / 16
"""Share of the steps in which rates rise: an optimizer that divides by past gradients has seen none at first."""


class Part(NamedTuple):
    """Some windows of one batch."""

    batch: int
    windows: slice


class BlockTraining:
    """The windows of a block, cut into parts that teach and parts that choose between the steps of a training.

    The block reads what the compressed blocks before it give, and is to give what the dense model gave. Errors are
    relative to the energy of each token: the first token of a text is a hundred times as long as the others in many
    models, and what comes next normalises every token.
    """

    def __init__(self, block: BlockWork, *, windows: int) -> None:
        self._block = block
        device = next(block.module.parameters()).device
        self.storage_dtype = block.context.storage_dtype
        self._wanted = [output.to(device) for output in block.dense_outputs]
        parts = [
            Part(batch, slice(first, first + windows))
            for batch, wanted in enumerate(self._wanted)
            for first in range(0, len(wanted), windows)
        ]
        self.generator = torch.Generator().manual_seed(block.context.seed * 1_000_003 + block.info.index)
        mixed = [parts[place] for place in self._order(len(parts))]
        held_out = len(parts) // _HELD_OUT or 1
        self._teaching, self._choosing = (
            (mixed[held_out:], mixed[:held_out]) if len(parts) >= _FEWEST else (mixed, mixed)
        )

    def steps(self, count: int, title: str) -> Iterator[tuple[int, Part]]:
        """So many parts to learn from, each pass over them in a new order; tells how far it is."""
        due: list[int] = []
        for step in range(count):
            self._block.context.progress.substep(title, done=step, total=count)
            due = due or self._order(len(self._teaching))
            yield step, self._teaching[due.pop()]

    def looks_after(self, step: int, count: int) -> bool:
        """Whether the block is measured after that step: a few times, and at the end."""
        return (step + 1) % max(1, count // _LOOKS) == 0 or step + 1 == count

    def loss(self, part: Part) -> Tensor:
        """Mean over tokens of squared error ÷ squared length, with gradients where enabled."""
        wanted = self._wanted[part.batch][part.windows]
        found = self._block.output(part.batch, part.windows)
        return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(_LEAST)).mean()

    @torch.no_grad()
    def error(self) -> float:
        """The same over all windows that choose, of all processes."""
        return self._mean(self._choosing)

    def stored_error(self, norms: Sequence[nn.Parameter]) -> float:
        """The same with norm weights as they would be stored."""
        exact = [norm.detach().clone() for norm in norms]
        with torch.no_grad():
            for norm in norms:
                norm.copy_(norm.to(self.storage_dtype))
            error = self.error()
            for norm, value in zip(norms, exact, strict=True):
                norm.copy_(value)
        return error

    def gradients(self, part: Part, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Of the loss, summed over all processes."""
        with torch.enable_grad():
            found = torch.autograd.grad(self.loss(part), parameters, materialize_grads=True)
        for gradient in found:
            self._block.pool_(gradient)
        return list(found)

    def _mean(self, parts: Sequence[Part]) -> float:
        losses = torch.stack([self.loss(part).double() for part in parts])
        total = torch.stack((losses.sum(), losses.new_tensor(float(len(losses)))))
        self._block.pool_(total)
        return float(total[0] / total[1])

    def _order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()


class LeastError:
    """The numbers with which a block erred least so far; those it began with are the first."""

    def __init__(self, parameters: Sequence[Tensor], first: float) -> None:
        self.first = self.error = first
        self._parameters = parameters
        self._kept = self._now()

    def see(self, error: float) -> None:
        """The error with the numbers as they are."""
        if error < self.error:
            self.error, self._kept = error, self._now()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best numbers back."""
        for parameter, value in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(value)

    def _now(self) -> list[Tensor]:
        return [value.detach().clone() for value in self._parameters]


class Group(NamedTuple):
    """Parameters with a learning rate of their own."""

    parameters: Sequence[nn.Parameter]
    rate: float


@dataclass(frozen=True)
class Steps:
    """How many steps a block is trained for, and what is done around each."""

    title: str
    count: int
    before: Callable[[int], None] = lambda _: None
    """Given the number of the step, from 0."""
    after: Callable[[], None] = lambda: None


def trained(
    training: BlockTraining, groups: Sequence[Group], steps: Steps, *, error: Callable[[], float]
) -> LeastError:
    """Adam on the block's loss, with rates that rise shortly and fall to zero; the parameters end where `error`, the
    windows kept apart, was least: the start among them."""
    parameters = [parameter for group in groups for parameter in group.parameters]
    required = [parameter.requires_grad for parameter in parameters]
    optimizer = torch.optim.Adam(
        [{"params": list(group.parameters), "lr": group.rate} for group in groups if group.parameters],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate((step + 0.5) / steps.count))
    least = LeastError(parameters, error())
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step, part in training.steps(steps.count, steps.title):
            steps.before(step)
            for parameter, gradient in zip(parameters, training.gradients(part, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            steps.after()
            if training.looks_after(step, steps.count):
                least.see(error())
    finally:
        for parameter, before in zip(parameters, required, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
    least.restore()
    return least


def norms_of(block: BlockWork, sites: Sequence[LinearSite]) -> list[nn.Parameter]:
    """Weights of the norms whose only consumers are these sites, none of which is compressed yet."""
    producers = dict.fromkeys(fold.producer for fold in block.folds_into(sites) if fold.producer_is_norm)
    return [block.module.get_parameter(f"{name}.weight") for name in producers]


def _rate(done: float) -> float:
    """Up in a line, then down to zero as a cosine."""
    return min(1.0, done / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
