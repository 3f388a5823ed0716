"""Distillation of attention distributions and of relations between values.

B = samples, H = heads, T = tokens, D = width of one head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.batch import Batch
from llmcompress.training.features import AttentionCall, Features, Wanted, observed
from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.features import FeatureObjective, at_least_float32, mean_over_predicting
from llmcompress.training.origin import kept_heads
from llmcompress.training.teacher import Teacher, live

_PROBED = 64
"""Tokens on which heads are recognised."""


@OBJECTIVES.register("attention_relations")
class AttentionRelations(FeatureObjective):
    """KL(teacher ‖ student) of the rows of softmax(Q Kᵀ · scale) and of softmax(V Vᵀ / √d), mean over heads.

    Every row is over the token itself and those before it.

    Source: Wang et al., arXiv 2002.10957, equations 6–8 (MiniLM), and arXiv 2012.15828, section 3.2 (heads split
    anew). Differs: causal; a sliding window of a model is not applied to the relations.
    """

    heads: Literal["kept"] | Annotated[int, Field(ge=1)] | None = None
    """Relation heads: the vectors of all heads, joined and split into so many; kept: each head with the one that it was
    before `width`, for a student made from this teacher; None: the models' own heads, whose numbers must be equal."""
    values: float = Field(default=1.0, ge=0)
    """Weight of the relations between values; 0: attention distributions alone."""

    _heads: dict[int, list[int]] = PrivateAttr(default_factory=dict)
    """Student's layer → the teacher's key-value head that each of its heads was."""

    @override
    def observes(self) -> Wanted:
        return Wanted(attention=True)

    @override
    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        found = super().begin(student, teacher)
        if self.heads == "kept":
            mine, theirs = (_calls(each) for each in (student, live(teacher, f"{self!r}").model))
            for of, to in self.numbers(len(mine), len(theirs)):
                self._heads[of] = kept_heads(mine[of].value_BGTD, theirs[to].value_BGTD)
        return found

    @override
    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = self.numbers(len(student.attention), len(teacher.attention))
        each = [self._layer(student.attention[of], self._of(of, teacher.attention[to])) for of, to in pairs]
        return mean_over_predicting(torch.stack(each).mean(0), batch)

    def _of(self, layer: int, theirs: AttentionCall) -> AttentionCall:
        """The teacher's heads that the student still has."""
        if self.heads != "kept":
            return theirs
        groups = self._heads[layer]
        shared = theirs.query_BHTD.shape[1] // theirs.key_BGTD.shape[1]
        queries = [group * shared + turn for group in groups for turn in range(shared)]
        return replace(
            theirs,
            query_BHTD=theirs.query_BHTD[:, queries],
            key_BGTD=theirs.key_BGTD[:, groups],
            value_BGTD=theirs.value_BGTD[:, groups],
        )

    def _layer(self, mine: AttentionCall, theirs: AttentionCall) -> Tensor:
        found_BT = _divergence(self._attention(mine), self._attention(theirs))
        if self.values:
            found_BT = found_BT + self.values * _divergence(self._between_values(mine), self._between_values(theirs))
        return found_BT

    def _attention(self, call: AttentionCall) -> Tensor:
        shared = call.query_BHTD.shape[1] // call.key_BGTD.shape[1]
        query, key = call.query_BHTD, call.key_BGTD.repeat_interleave(shared, 1)
        scaling = call.scaling
        if isinstance(self.heads, int):
            width = query.shape[-1]
            query, key = _split(query, self.heads), _split(key, self.heads)
            scaling *= (width / query.shape[-1]) ** 0.5
        return _log_rows(query, key, scaling)

    def _between_values(self, call: AttentionCall) -> Tensor:
        value = _split(call.value_BGTD, self.heads) if isinstance(self.heads, int) else call.value_BGTD
        return _log_rows(value, value, value.shape[-1] ** -0.5)


@torch.no_grad()
def _calls(model: PreTrainedModel) -> list[AttentionCall]:
    """Of every attention, on a text that is the same for all models with this vocabulary."""
    ids_BT = torch.arange(min(_PROBED, model.config.get_text_config().vocab_size), device=model.device)[None]
    with observed(model, Wanted(attention=True)) as found:
        model(input_ids=ids_BT, use_cache=False)
    return found.attention


def _split(vectors_BHTD: Tensor, heads: int) -> Tensor:
    joined_BTC = vectors_BHTD.transpose(1, 2).flatten(2)
    if joined_BTC.shape[-1] % heads:
        raise _heads(f"{joined_BTC.shape[-1]} channels do not divide into {heads} relation heads")
    return joined_BTC.view(*joined_BTC.shape[:-1], heads, -1).transpose(1, 2)


def _log_rows(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float) -> Tensor:
    """B×H×T×T: log-softmax over tokens that are not later; -inf there."""
    scores = at_least_float32(query_BHTD) @ at_least_float32(key_BHTD).transpose(-1, -2) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return functional.log_softmax(scores.masked_fill(later, float("-inf")), -1)


def _divergence(mine_BHTT: Tensor, theirs_BHTT: Tensor) -> Tensor:
    """B×T: KL(theirs ‖ mine) of every row, mean over heads."""
    if mine_BHTT.shape != theirs_BHTT.shape:
        raise _heads(f"the student has {mine_BHTT.shape[1]} heads and the teacher {theirs_BHTT.shape[1]}")
    earlier = torch.isfinite(theirs_BHTT)
    # -inf - -inf has no gradient that is a number: both are replaced first
    mine, theirs = mine_BHTT.where(earlier, 0.0), theirs_BHTT.where(earlier, 0.0)
    return (theirs.exp() * (theirs - mine)).where(earlier, 0.0).sum(-1).mean(1)


def _heads(what: str) -> CompressError:
    return CompressError(
        "training.heads",
        what,
        where="attention_relations",
        fix="set `heads` to a number that divides the channels of both",
        exit_code=ExitCode.USAGE,
    )
