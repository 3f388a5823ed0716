"""Distillation of hidden states. B = samples, T = tokens, D = the student's width, E = the teacher's."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.training.data.batch import Batch
from llmcompress.training.features import Features, Wanted
from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.features import FeatureObjective, mean_over_predicting
from llmcompress.training.teacher import Teacher, live


@OBJECTIVES.register("hidden_states")
class HiddenStates(FeatureObjective):
    """Distance between the outputs of mapped blocks; where widths differ, after a learned projection of the student's.

    The projections are trained with the student and dropped afterwards.

    Source: Jiao et al., arXiv 1909.10351, equation 8 (squares); Sanh et al., arXiv 1910.01108 (cosine).
    """

    distance: Literal["squares", "cosine"] = "squares"
    """Mean squared difference, or 1 - cosine of the angle."""

    _projections: dict[int, nn.Parameter] = PrivateAttr(default_factory=dict)

    @override
    def observes(self) -> Wanted:
        return Wanted(hidden=True)

    @override
    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        other = live(teacher, f"{self!r}").model
        mine, theirs = student.config.get_text_config(), other.config.get_text_config()
        self._find_layers(student, other)
        self._projections.clear()
        if mine.hidden_size != theirs.hidden_size:
            pairs = self.numbers(mine.num_hidden_layers, theirs.num_hidden_layers)
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                for index, _ in pairs:
                    plain_ED = torch.randn(theirs.hidden_size, mine.hidden_size) / mine.hidden_size**0.5
                    self._projections[index] = nn.Parameter(plain_ED.to(student.device))
        return list(self._projections.values())

    @override
    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        losses = [
            self._distance(self._projected(layer, mine), theirs)
            for layer, mine, theirs in self.pairs(student.hidden, teacher.hidden)
        ]
        return mean_over_predicting(torch.stack(losses).mean(0), batch)

    def _projected(self, layer: int, hidden_BTD: Tensor) -> Tensor:
        projection = self._projections.get(layer)
        return hidden_BTD if projection is None else functional.linear(hidden_BTD, projection)

    def _distance(self, mine_BTE: Tensor, theirs_BTE: Tensor) -> Tensor:
        if self.distance == "cosine":
            return 1 - functional.cosine_similarity(mine_BTE, theirs_BTE, dim=-1)
        return (mine_BTE - theirs_BTE).square().mean(-1)
