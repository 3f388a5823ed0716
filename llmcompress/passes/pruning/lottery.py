"""Lottery tickets: train, prune the smallest weights, rewind to early weights, repeat; the ticket is the remaining
network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.numerics.saliency import Comparison, drop_lowest, hamming_distance
from llmcompress.passes.base import PASSES, Backward, ModelPass, Trait
from llmcompress.passes.pruning.at_init import trained_weight
from llmcompress.passes.pruning.sparse import sparsity
from llmcompress.records.rows import SiteReport
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Callback, Job
from llmcompress.training.loop import train
from llmcompress.training.settings import Training

CHECKS = 5
"""Masks that must agree before an early-bird stop."""


@PASSES.register("lottery_ticket")
class LotteryTicket(ModelPass):
    """Iterative magnitude pruning with rewinding, on trained or freshly initialised weights.

    After `rounds` rounds the sparsity is 1 - (1 - fraction per round) ** rounds.

    Source: Frankle and Carbin, arXiv 1803.03635; rewinding: Frankle et al., arXiv 1903.01611; early stop: You et al.,
    arXiv 1909.11957. Differs: AdamW's moments are reset at each rewinding.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"zeros"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "pattern": "would add zeros that are not in the pattern",
    }

    rounds: int = Field(3, ge=1, description="rounds of training, pruning and rewinding")
    share: float = Field(0.2, gt=0, lt=1, description="fraction of the remaining weights pruned per round")
    comparison: Comparison = Field("global", description="rank weights across the whole model, or within each site")
    rewind_step: int = Field(0, ge=0, description="rewind to the weights after this step of the first training")
    finish: Literal["trained", "rewound"] = Field(
        "trained", description="trained: train the ticket at the end; rewound: leave it at the weights of `rewind_step`"
    )
    early_bird: bool = Field(
        False, description="early-bird tickets: stop a round's training once its mask no longer changes"
    )
    early_bird_distance: float = Field(
        0.1, gt=0, lt=1, description="largest fraction of weights in which the last 5 masks may differ"
    )
    early_bird_every: int = Field(5, ge=1, description="steps between two checks of the mask")
    training: Training = Field(default_factory=Training, description="steps, learning rate and batches of each round")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rewind_step >= self.training.steps:
            raise ValueError(f"`rewind_step` must be below the {self.training.steps} steps of `training`")
        return self

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def backward(self) -> Backward | None:
        training, seen = self.training, self.rounds * self.training.windows
        return Backward(of_all=4, windows=training.batch, trained_on=seen, lowered=training.lowered)

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        with whole.resident():
            weights = [trained_weight(site) for site in whole.sites()]
            start = _Snapshot.of(whole.model)
            for index in range(self.rounds):
                dropped = 1 - (1 - self.share) ** (index + 1)
                masks = partial(self._masks, weights, dropped)
                watch = _Watch(self, whole, start, masks if self.early_bird else None)
                self._train(whole, f"round {index + 1} of {self.rounds}", watch, first=index == 0)
                start, pruned = watch.start, masks()
                start.restore(whole.model)
                with torch.no_grad():
                    for weight, mask in zip(weights, pruned, strict=True):
                        weight.masked_fill_(mask, 0)
            if self.finish == "trained":
                self._train(whole, "the last", _Watch(self, whole, start, None), first=False)
        return [
            SiteReport(site=site.name, algorithm="lottery_ticket", sparsity=sparsity(site.weight_OI))
            for site in whole.sites()
        ]

    def _train(self, whole: WholeModel, title: str, watch: _Watch, *, first: bool) -> None:
        """One training; the first one begins at step 0 and passes the step to rewind to."""
        watch.passes_rewind_step = first
        job = Job(f"lottery ticket, {title}", callback=watch, start=0 if first else self.rewind_step)
        train(whole.model, Windows(whole.context.windows_NT), self.training, whole.context, job=job)

    def _masks(self, weights: Sequence[nn.Parameter], dropped: float) -> list[Tensor]:
        scores = [weight.detach().abs() for weight in weights]
        return drop_lowest(scores, [score == 0 for score in scores], dropped, self.comparison)


class _Watch(Callback):
    """Records the weights to rewind to, and ends a training whose last few masks no longer differ.

    Source: You et al., arXiv 1909.11957, section 3.2 (masks drawn at checkpoints, normalised Hamming distance).
    """

    def __init__(
        self, ticket: LotteryTicket, whole: WholeModel, start: _Snapshot, masks: Callable[[], list[Tensor]] | None
    ) -> None:
        self._ticket, self._whole, self._masks = ticket, whole, masks
        self._latest: deque[list[Tensor]] = deque(maxlen=CHECKS)
        self.start = start
        """What the weights go back to after the training."""
        self.passes_rewind_step = False

    @override
    def after_step(self, step: int) -> bool:
        ticket = self._ticket
        if self.passes_rewind_step and step == ticket.rewind_step:
            self.start = _Snapshot.of(self._whole.model)
        # a stop before the step to go back to would leave nothing to go back to
        if self._masks is None or step % ticket.early_bird_every or step < ticket.rewind_step:
            return False
        settled = self._settled(self._masks())
        if settled:
            self._whole.context.progress.note(
                f"early bird: the mask no longer changes after step {step} of {ticket.training.steps}"
            )
        return settled

    def _settled(self, masks: list[Tensor]) -> bool:
        """Whether this mask and the four before it lie close together."""
        self._latest.append(masks)
        if len(self._latest) < CHECKS:
            return False
        return max(hamming_distance(masks, earlier) for earlier in self._latest) < self._ticket.early_bird_distance

    @override
    def state(self) -> dict[str, Tensor]:
        start = {f"start.{index}": each for index, each in enumerate(self.start.parameters)}
        return start | {
            f"mask.{age}.{index}": mask for age, masks in enumerate(self._latest) for index, mask in enumerate(masks)
        }

    @override
    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.start = _Snapshot([state[f"start.{index}"] for index in range(len(self.start.parameters))])
        ages = sorted({int(name.split(".")[1]) for name in state if name.startswith("mask.")})
        device = self._whole.context.device
        for age in ages:
            count = sum(name.startswith(f"mask.{age}.") for name in state)
            self._latest.append([state[f"mask.{age}.{index}"].to(device) for index in range(count)])


@dataclass(frozen=True)
class _Snapshot:
    """All parameters at some step, on the CPU."""

    parameters: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        return cls([each.detach().cpu().clone() for each in model.parameters()])

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        for parameter, kept in zip(model.parameters(), self.parameters, strict=True):
            parameter.copy_(kept)
