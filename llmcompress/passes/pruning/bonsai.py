"""Bonsai: structured pruning by evaluating random sub-models, with forward passes only. C = candidates, U = units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.units import UnitGroup, masked
from llmcompress.numerics.regression import fit_by_rank
from llmcompress.passes.base import PASSES
from llmcompress.passes.pruning.allocation import ALLOCATIONS, Request, best
from llmcompress.passes.pruning.scores.base import SCORES
from llmcompress.passes.pruning.width import WidthPass


@PASSES.register("bonsai")
class Bonsai(WidthPass):
    """Remove units in rounds; each evaluates random sub-models and fits a linear regression of their loss on the
    removed units.

    Source: Dery et al., arXiv 2402.05406, and its repository. Differs: the regression's target is the mean loss (the
    logarithm of the perplexity), and the number of candidates is the same in every layer.
    """

    whole_block: ClassVar[frozenset[str]] = WidthPass.whole_block | {"prior", "step", "masks", "windows"}

    prior: str = Field("activation", description="score from which sub-models are drawn")
    step: float = Field(0.05, gt=0, lt=1, description="fraction of all units that one round removes")
    masks: int = Field(200, ge=10, description="sub-models evaluated per round; half are the complements of the others")
    windows: int = Field(32, ge=1, description="calibration windows for evaluating each sub-model")

    @field_validator("prior")
    @classmethod
    def _known(cls, name: str) -> str:
        return SCORES.name_of(SCORES[name])

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def choose(self, whole: WholeModel, groups: Sequence[UnitGroup], requests: Sequence[Request]) -> list[Tensor]:
        generator = whole.context.generator()
        kept = [torch.ones(group.units, dtype=torch.bool) for group in groups]
        rounds = max(1, math.ceil(max(request.fraction for request in requests) / self.step - 1e-9))
        for turn in range(1, rounds + 1):
            whole.context.progress.substep("bonsai", done=turn - 1, total=rounds)
            asked = [replace(request, fraction=request.fraction * turn / rounds) for request in requests]
            kept = self._round(whole, groups, asked, kept, generator)
        return kept

    def _round(
        self,
        whole: WholeModel,
        groups: Sequence[UnitGroup],
        requests: Sequence[Request],
        kept: Sequence[Tensor],
        generator: torch.Generator,
    ) -> list[Tensor]:
        """Remove as many more units as the requests ask."""
        score, allocate = SCORES[self.prior](groups), ALLOCATIONS[self.allocation]
        # what is measured under masks must not pass for what the whole model gives
        masked_model = whole.within(whole.context.changing())
        with masked(whole.model, groups, [_mask(kept_U, whole.context.device) for kept_U in kept]):
            table = score.measured(masked_model)
        known = [
            _gone_last(priority_U, kept_U) for priority_U, kept_U in zip(score.priorities(table), kept, strict=True)
        ]
        would = allocate(requests, known)
        candidates = [
            _candidates(priority_U, kept_U, would_U)
            for priority_U, kept_U, would_U in zip(known, kept, would, strict=True)
        ]
        if not any(len(each) for each in candidates):
            return [kept_U & would_U for kept_U, would_U in zip(kept, would, strict=True)]
        prior = [row.loss_C for row in table.rows]
        weights_C = self._regress(whole, groups, kept, candidates, prior, generator)
        worth = []
        for group, kept_U, tried_C, fitted_C in zip(
            groups, kept, candidates, torch.split(weights_C, [len(each) for each in candidates]), strict=True
        ):
            worth_U = torch.full((group.units,), math.inf, dtype=torch.float64)
            # what a unit's presence takes off the loss, per weight that it costs
            worth_U[tried_C] = -fitted_C / group.parameters
            worth.append(_gone_last(worth_U, kept_U))
        return [kept_U & now_U for kept_U, now_U in zip(kept, allocate(requests, worth), strict=True)]

    def _regress(
        self,
        whole: WholeModel,
        groups: Sequence[UnitGroup],
        kept: Sequence[Tensor],
        candidates: Sequence[Tensor],
        prior: Sequence[Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """What the presence of each candidate adds to the loss, according to random sub-models."""
        presence: list[Tensor] = []
        losses: list[float] = []
        with whole.resident() as model:
            while len(losses) < self.masks:
                drawn = [_draw(prior_U[tried_C], generator) for prior_U, tried_C in zip(prior, candidates, strict=True)]
                # a mask and its complement: every candidate is seen present and absent equally often
                for present in (drawn, [~each for each in drawn]):
                    masks = [kept_U.clone() for kept_U in kept]
                    for mask_U, tried_C, present_C in zip(masks, candidates, present, strict=True):
                        mask_U[tried_C] = present_C
                    with masked(model, groups, [_mask(mask_U, whole.context.device) for mask_U in masks]):
                        losses.append(self._loss(whole))
                    presence.append(torch.cat(present))
        fitted = fit_by_rank(torch.stack(presence).double(), torch.tensor(losses, dtype=torch.float64))
        whole.context.progress.note(
            f"bonsai: {fitted.model} ranks held-out sub-models with Kendall tau {fitted.tau:.2f}"
        )
        return fitted.weights_F

    @torch.no_grad()
    def _loss(self, whole: WholeModel) -> float:
        windows_NT = whole.context.windows_NT[: self.windows]
        total = 0.0
        for ids_BT in whole.batches(windows_NT):
            total += float(whole.loss(ids_BT)) * len(ids_BT)
        # the perplexity of a broken sub-model counts as 1e8, as in the repository
        return min(total / len(windows_NT), math.log(1e8)) if math.isfinite(total) else math.log(1e8)


def _mask(kept_U: Tensor, device: torch.device) -> Tensor:
    return kept_U.to(device, torch.float32)


def _gone_last(priority_U: Tensor, kept_U: Tensor) -> Tensor:
    """What is gone already has the lowest priority there is."""
    return torch.where(kept_U, priority_U.double(), -torch.inf)


def _candidates(priority_U: Tensor, kept_U: Tensor, would_U: Tensor) -> Tensor:
    """Twice as many of the remaining units as this round removes, those that the prior values least."""
    removing = int((kept_U & ~would_U).sum())
    left = kept_U.nonzero().flatten()
    count = min(2 * removing, len(left))
    return left[priority_U[left].argsort(stable=True)[:count]].sort().values


def _draw(prior_C: Tensor, generator: torch.Generator) -> Tensor:
    """True for the half of the candidates that is present; the more important by the prior, the more often."""
    count = len(prior_C)
    if count == 0:
        return torch.zeros(0, dtype=torch.bool)
    chance_C = prior_C.double().clamp_min(0)
    chance_C = chance_C / chance_C.max().clamp_min(torch.finfo(torch.float64).tiny) + 1e-6
    # the largest of log(u) / weight: a draw without replacement in proportion to the weights (Efraimidis, Spirakis)
    keys_C = torch.rand(count, generator=generator, dtype=torch.float64).log() / chance_C
    return best(keys_C, (count + 1) // 2)
