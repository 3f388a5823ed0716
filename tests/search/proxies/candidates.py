"""A slow and obvious stand-in for the bench of levels: every candidate is compressed by its own recipe."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.space import Space
from tests.families import tiny_model, tiny_tokens

SPACE = {
    "sites": {"dense": [], "int4": [{"rtn": {"scheme": "int4_g16"}}], "int2": [{"rtn": {"scheme": "int2_g16"}}]},
    "per": "block",
    "bodies": {"whole": [], "narrow": [{"width": {"fraction": 0.5, "heads": False, "refit": "none"}}]},
    "most_dropped": 0.4,
}


@dataclass
class FullText:
    windows_NT: Tensor
    dense_NTV: Tensor


class Compressing:
    """`Candidates` without levels."""

    def __init__(self, whole: WholeModel, space: PlanSpace) -> None:
        self.whole, self.space = whole, space
        self.asked: list[Plan] = []
        self._made: dict[Plan, PreTrainedModel] = {}

    @torch.no_grad()
    def text(self, windows_NT: Tensor) -> FullText:
        return FullText(windows_NT, self.whole.model(input_ids=windows_NT).logits)

    def divergences(self, plan: Plan, text: FullText) -> Tensor:
        self.asked.append(plan)
        return self.divergences_of(self.assembled(plan), text)

    @torch.no_grad()
    def divergences_of(self, model: PreTrainedModel, text: FullText) -> Tensor:
        found_NTV = model(input_ids=text.windows_NT).logits[:, :-1].log_softmax(-1)
        wanted_NTV = text.dense_NTV[:, :-1].log_softmax(-1)
        return functional.kl_div(found_NTV, wanted_NTV, log_target=True, reduction="none").sum(-1).mean(-1)

    def assembled(self, plan: Plan) -> PreTrainedModel:
        if plan not in self._made:
            self._made[plan] = self._compressed(plan)
        return copy.deepcopy(self._made[plan])

    def _compressed(self, plan: Plan) -> PreTrainedModel:
        model = copy.deepcopy(self.whole.model)
        try:
            passes = recipe_of(self.space, plan, {}).passes
        except CompressError as nothing:
            assert nothing.code == "search.nothing"
            return model
        return apply_passes(model, self.whole.map, passes, replace(self.whole.context, keep=None)).model


def candidates(space: dict[str, object] = SPACE, *, family: str = "llama_gqa", windows: int = 8) -> Compressing:
    model = tiny_model(family)
    whole = WholeModel(model, map_model(model), RunContext(tiny_tokens(family, windows, 16), batch=4))
    return Compressing(whole, PlanSpace(Space.model_validate(space), whole.map))


def judged_windows(family: str = "llama_gqa", count: int = 4) -> Tensor:
    return tiny_tokens(family, count, 16, seed=1)
