"""Divergences: the textbook's formulas in float64, their limits, and what is told of a teacher that does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.errors import CompressError
from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.head import Predictions
from llmcompress.training.objectives.base import ObjectiveInputs
from llmcompress.training.objectives.contrastive import Contrastive
from llmcompress.training.objectives.divergence import Divergence
from llmcompress.training.objectives.jsd import JSD
from llmcompress.training.objectives.kl import KL
from llmcompress.training.objectives.skew_kl import SkewKL
from llmcompress.training.objectives.total_variation import TotalVariation
from llmcompress.training.teacher import TeacherPredictions

ALL = [
    KL(), KL(direction="reverse"), JSD(beta=0.3), SkewKL(skew=0.2), SkewKL(direction="reverse", skew=0.2),
    TotalVariation(), Contrastive(skew=0.2),
]  # fmt: skip
TARGETS = torch.tensor([1, 2, IGNORED, 4, 5, 6])


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student, teacher


def kl(of: Tensor, to: Tensor) -> Tensor:
    return (of * (of / to).log()).sum(-1)


def textbook(objective: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilities and nothing clever."""
    q, p = ((each / objective.temperature).softmax(-1) for each in (student, teacher))
    match objective:
        case JSD(beta=beta):
            between = beta * p + (1 - beta) * q
            return beta * kl(p, between) + (1 - beta) * kl(q, between)
        case SkewKL(direction="reverse", skew=skew):
            return kl(q, skew * q + (1 - skew) * p)
        case SkewKL(skew=skew) | Contrastive(skew=skew):
            return kl(p, skew * p + (1 - skew) * q)
        case TotalVariation():
            return (p - q).abs().sum(-1) / 2
        case KL(direction="reverse"):
            return kl(q, p)
        case _:
            return kl(p, q)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_value_and_gradient_are_those_of_the_textbook(objective: Divergence) -> None:
    student, teacher = logits()
    softer = objective.model_copy(update={"temperature": 2.0})
    power = 2.0 if isinstance(objective, TotalVariation) else 4.0
    for each, scale in ((objective, 1.0), (softer, power)):
        mine, slow = student.clone().requires_grad_(), student.clone().requires_grad_()
        found, expected = each.per_token(mine, TARGETS, teacher), scale * textbook(each, slow, teacher)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), mine), torch.autograd.grad(expected.sum(), slow), atol=1e-12, rtol=1e-10
        )


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_nothing_diverges_from_itself_and_everything_else_does(objective: Divergence) -> None:
    student, teacher = logits()
    assert objective.per_token(student, TARGETS, student).abs().max() < 1e-14
    assert objective.per_token(student, TARGETS, teacher).min() > 1e-3


def test_skew_tends_to_the_plain_divergence_and_never_exceeds_it() -> None:
    student, teacher = logits()
    for direction in ("forward", "reverse"):
        plain = KL(direction=direction).per_token(student, TARGETS, teacher)
        torch.testing.assert_close(
            SkewKL(direction=direction, skew=1e-9).per_token(student, TARGETS, teacher), plain, atol=0, rtol=1e-5
        )
        for skew in (0.1, 0.5, 0.9):
            assert (SkewKL(direction=direction, skew=skew).per_token(student, TARGETS, teacher) < plain).all()


def test_the_generalised_jsd_has_both_divergences_as_limits_and_ends() -> None:
    student, teacher = logits()
    forward, reverse = (KL(direction=way).per_token(student, TARGETS, teacher) for way in ("forward", "reverse"))
    near = JSD(beta=1e-7).per_token(student, TARGETS, teacher) / 1e-7
    far = JSD(beta=1 - 1e-7).per_token(student, TARGETS, teacher) / 1e-7
    torch.testing.assert_close(near, forward, atol=0, rtol=1e-4)
    torch.testing.assert_close(far, reverse, atol=0, rtol=1e-4)
    assert torch.equal(JSD(beta=0).per_token(student, TARGETS, teacher), forward)
    assert torch.equal(JSD(beta=1).per_token(student, TARGETS, teacher), reverse)


@pytest.mark.parametrize("objective", [SkewKL(), SkewKL(direction="reverse"), JSD(), TotalVariation()], ids=repr)
def test_what_is_bounded_stays_finite_where_one_model_excludes_what_the_other_says(objective: Divergence) -> None:
    student, teacher = torch.tensor([[0.0, -1e4]]).requires_grad_(), torch.tensor([[-1e4, 0.0]])
    loss = objective.per_token(student, torch.tensor([0]), teacher).sum()
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_the_rest_of_the_weight_is_cross_entropy() -> None:
    student, teacher = logits()
    entropy = functional.cross_entropy(student, TARGETS, ignore_index=IGNORED, reduction="none")
    for plain in ALL:
        mixed = plain.model_copy(update={"weight": 0.25}).per_token(student, TARGETS, teacher)
        torch.testing.assert_close(mixed, 0.25 * plain.per_token(student, TARGETS, teacher) + 0.75 * entropy)


def test_contrastive_pulls_on_given_text_and_pushes_on_the_students() -> None:
    student, teacher = logits()
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), TARGETS.view(2, 3), generated_B=torch.tensor([False, True]))
    said = TeacherPredictions(teacher, lambda rows: rows)
    inputs = ObjectiveInputs(1, batch, Predictions(student, lambda rows: rows), said, 6)
    found = Contrastive(skew=0.1, balance=0.3).loss(inputs)
    given = SkewKL(skew=0.1).per_token(student, TARGETS, teacher)[[0, 1]]
    own = SkewKL(skew=0.1, direction="reverse").per_token(student, TARGETS, teacher)[[3, 4, 5]]
    torch.testing.assert_close(found, 2 * (0.7 * given.sum() + 0.3 * own.sum()) / 5)
    parts = ObjectiveInputs(1, batch, inputs.student, said, 2)
    torch.testing.assert_close(Contrastive(skew=0.1, balance=0.3).loss(parts), found, check_dtype=False)


def test_another_vocabulary_is_refused() -> None:
    student, _ = logits()
    with pytest.raises(CompressError) as caught:
        JSD().per_token(student, TARGETS, student[:, :8])
    assert caught.value.code == "training.vocabulary"
