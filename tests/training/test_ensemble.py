"""Several teachers: identical ones are one; weights, entropy gate and posterior equal their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.ensemble import EnsembleTeacher, Gate
from llmcompress.training.features import Wanted
from llmcompress.training.teacher import TeacherPredictions

IDS = torch.tensor([[3, 1, 4, 1], [0, 2, 2, 5]])
TARGETS = torch.tensor([[1, 4, 1, IGNORED], [IGNORED, 2, 5, IGNORED]])
BATCH = Batch(IDS, TARGETS)


class Fixed:
    """Says the same of the same positions."""

    vocabulary = None

    def __init__(self, seed: int) -> None:
        self.logits_RV = 2 * torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))

    def predictions(self, batch: Batch, wanted: Wanted) -> TeacherPredictions:
        return TeacherPredictions(self.logits_RV, lambda rows: rows)


def said(teacher: EnsembleTeacher, part: Tensor | None = None) -> Tensor:
    found = teacher.predictions(BATCH, Wanted())
    rows = found.rows(found.values_RX if part is None else found.values_RX[part])
    assert isinstance(rows, Tensor)
    return rows.exp()


@pytest.mark.parametrize("gate", ["fixed", "entropy", "posterior"])
def test_identical_teachers_are_one_and_every_mixture_is_a_distribution(gate: Gate) -> None:
    one = Fixed(0).logits_RV.softmax(-1)
    same = EnsembleTeacher([Fixed(0), Fixed(0), Fixed(0)], weights=[1, 2, 3], gate=gate)
    torch.testing.assert_close(said(same), one)
    mixed = said(EnsembleTeacher([Fixed(0), Fixed(1)], gate=gate))
    torch.testing.assert_close(mixed.sum(-1), torch.ones(8))
    assert (mixed - one).abs().max() > 0.1


def test_probabilities_are_averaged_with_the_weights() -> None:
    p, q = Fixed(0).logits_RV.softmax(-1), Fixed(1).logits_RV.softmax(-1)
    torch.testing.assert_close(said(EnsembleTeacher([Fixed(0), Fixed(1)], weights=[3, 1])), 0.75 * p + 0.25 * q)
    part = torch.tensor([6, 1])
    torch.testing.assert_close(said(EnsembleTeacher([Fixed(0), Fixed(1)]), part), ((p + q) / 2)[part])


def test_a_sure_teacher_counts_more_at_that_token() -> None:
    p, q = Fixed(0).logits_RV.softmax(-1), Fixed(1).logits_RV.softmax(-1)
    gates = torch.stack([(each * each.log()).sum(-1).exp() for each in (p, q)])
    gates = gates / gates.sum(0)
    found = said(EnsembleTeacher([Fixed(0), Fixed(1)], gate="entropy"))
    torch.testing.assert_close(found, gates[0][:, None] * p + gates[1][:, None] * q)


def test_the_posterior_is_bayes_rule_over_the_tokens_so_far() -> None:
    members = [Fixed(0), Fixed(1)]
    found = said(EnsembleTeacher(members, weights=[3, 1], gate="posterior")).view(2, 4, 6)
    tables = [each.logits_RV.softmax(-1).view(2, 4, 6) for each in members]
    for sample in range(2):
        belief = torch.tensor([0.75, 0.25])
        for t in range(4):
            expected = sum(weight * table[sample, t] for weight, table in zip(belief, tables, strict=True))
            torch.testing.assert_close(found[sample, t], expected)
            if (target := int(TARGETS[sample, t])) != IGNORED:
                belief = belief * torch.stack([table[sample, t, target] for table in tables])
                belief = belief / belief.sum()


def test_every_teacher_has_one_weight_above_zero() -> None:
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(CompressError) as caught:
            EnsembleTeacher([Fixed(0), Fixed(1)], weights=weights)
        assert caught.value.code == "training.weights"
