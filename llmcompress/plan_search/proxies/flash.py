"""Flash distillation: a candidate is judged after a small share of the training that it would get in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.passes.retraining import TrainingPass
from llmcompress.plan_search.plan_space import Plan, PlanSpace

SHARE = 0.05
"""Of the steps. Source: AutoDistill (Zhang et al., arXiv 2201.08539), flash distillation."""


def shortened(passes: Sequence[Pass], share: float = SHARE) -> tuple[Pass, ...]:
    """The same passes, whose trainings take that share of their steps, at least one; each runs through its whole
    learning rate schedule."""
    return tuple(_short(each, share) if isinstance(each, TrainingPass) else each for each in passes)


def with_short_trainings(space: PlanSpace, share: float = SHARE) -> PlanSpace:
    """The space whose `after` choices train for a share of their steps; its plans mean the same otherwise.

    A bench of it judges by flash distillation: `ChangedJudge(Bench(whole, with_short_trainings(space), store), text)`.

    Raises: CompressError where no choice of `after` trains.
    """
    after = {name: shortened(passes, share) for name, passes in space.space.after.items()}
    if after == space.space.after:
        raise CompressError(
            "search.nothing-to-shorten",
            "no choice of this space trains, so there is nothing that flash distillation could shorten",
            where="after",
            fix="add a choice such as `after: {healed: [{distill: {training: {steps: 400}}}]}`",
            exit_code=ExitCode.USAGE,
        )
    return PlanSpace(space.space.model_copy(update={"after": after}), space.model_map)


class AppliedPasses:
    """Passes on the whole model as a change of candidates: what comes after the search, in full or `shortened`."""

    def __init__(self, passes: Sequence[Pass], context: RunContext) -> None:
        self._passes, self._context = tuple(passes), replace(context, keep=None, state=None)

    @property
    def fingerprint(self) -> str:
        """The passes."""
        named = [{PASSES.name_of(type(each)): each.model_dump(mode="json")} for each in self._passes]
        return f"passes: {json.dumps(named, sort_keys=True)}"

    def __call__(self, plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
        """Apply them."""
        return apply_passes(model, map_model(model), self._passes, self._context).model


def _short(each: TrainingPass, share: float) -> Pass:
    steps = max(1, round(share * each.training.steps))
    return each.model_copy(update={"training": each.training.model_copy(update={"steps": steps})})
