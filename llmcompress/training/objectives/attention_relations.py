"""Distillation of attention distributions and of relations between values.

B = samples, H = heads, T = tokens, D = width of one head.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.batch import Batch
from llmcompress.training.features import AttentionCall, Features, Wanted
from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.features import FeatureObjective, at_least_float32, mean_over_predicting
from llmcompress.training.objectives.layer_map import layer_pairs


@OBJECTIVES.register("attention_relations")
class AttentionRelations(FeatureObjective):
    """KL(teacher ‖ student) of the rows of softmax(Q Kᵀ · scale) and of softmax(V Vᵀ / √d), mean over heads.

    Every row is over the token itself and those before it.

    Source: Wang et al., arXiv 2002.10957, equations 6–8 (MiniLM), and arXiv 2012.15828, section 3.2 (heads split
    anew). Differs: causal; a sliding window of a model is not applied to the relations.
    """

    heads: int | None = Field(default=None, ge=1)
    """Relation heads: the vectors of all heads, joined and split into so many; None: the models' own heads, whose
    numbers must be equal."""
    values: float = Field(default=1.0, ge=0)
    """Weight of the relations between values; 0: attention distributions alone."""

    @override
    def observes(self) -> Wanted:
        return Wanted(attention=True)

    @override
    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = layer_pairs(self.layers, len(student.attention), len(teacher.attention))
        total_BT = torch.stack([self._layer(student.attention[of], teacher.attention[to]) for of, to in pairs]).mean(0)
        return mean_over_predicting(total_BT, batch)

    def _layer(self, mine: AttentionCall, theirs: AttentionCall) -> Tensor:
        found_BT = _divergence(self._attention(mine), self._attention(theirs))
        if self.values:
            found_BT = found_BT + self.values * _divergence(self._between_values(mine), self._between_values(theirs))
        return found_BT

    def _attention(self, call: AttentionCall) -> Tensor:
        shared = call.query_BHTD.shape[1] // call.key_BGTD.shape[1]
        query, key = call.query_BHTD, call.key_BGTD.repeat_interleave(shared, 1)
        scaling = call.scaling
        if self.heads:
            width = query.shape[-1]
            query, key = _split(query, self.heads), _split(key, self.heads)
            scaling *= (width / query.shape[-1]) ** 0.5
        return _log_rows(query, key, scaling)

    def _between_values(self, call: AttentionCall) -> Tensor:
        value = _split(call.value_BGTD, self.heads) if self.heads else call.value_BGTD
        return _log_rows(value, value, value.shape[-1] ** -0.5)


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
