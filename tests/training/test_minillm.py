"""MiniLLM's gradient equals that of the reverse KL between whole texts, found by listing all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmcompress.training.data.batch import Batch
from llmcompress.training.head import Predictions
from llmcompress.training.objectives.base import ObjectiveInputs
from llmcompress.training.objectives.minillm import MiniLLM, importance_weights
from llmcompress.training.teacher import TeacherPredictions

VOCABULARY, LENGTH = 3, 3
CONTEXTS = sum(VOCABULARY**length for length in range(LENGTH))
"""What can stand before a token: nothing, one token, two tokens."""
TEXTS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))


def table(seed: int) -> Tensor:
    """A model: logits of the next token after every context."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CONTEXTS, VOCABULARY, generator=generator, dtype=torch.float64)


def context(before: tuple[int, ...]) -> int:
    shorter = sum(VOCABULARY**length for length in range(len(before)))
    return shorter + sum(token * VOCABULARY**place for place, token in enumerate(reversed(before)))


def log_probs(model: Tensor, text: tuple[int, ...]) -> Tensor:
    """Of every token of a text."""
    return torch.stack([model[context(text[:t])].log_softmax(-1)[token] for t, token in enumerate(text)])


def loss_of(objective: MiniLLM, model: Tensor, teacher: Tensor, text: tuple[int, ...], rows_at_once: int) -> Tensor:
    """The sum over its tokens, as the training loop computes it."""
    seen = torch.tensor([context(text[:t]) for t in range(LENGTH)])
    # the token before the text is a prompt: position t predicts token t of the text
    batch = Batch(
        torch.zeros(1, LENGTH, dtype=torch.long), torch.tensor([text]), generated_B=torch.ones(1, dtype=torch.bool)
    )
    student = Predictions(seen[:, None], lambda values: model[values[:, 0]])
    said = TeacherPredictions(seen[:, None], lambda values: teacher[values[:, 0]])
    return objective.loss(ObjectiveInputs(1, batch, student, said, rows_at_once)) * LENGTH


def expected_gradient(objective: MiniLLM) -> Tensor:
    """Over all texts, with the probability with which each is drawn."""
    model, teacher = table(0).requires_grad_(), table(1)
    total = torch.zeros_like(model)
    for text in TEXTS:
        q = log_probs(model.detach(), text)
        drawn = q.sum().exp()
        total += drawn * torch.autograd.grad(loss_of(objective, model, teacher, text, 100), model)[0]
    return total


def true_gradient() -> Tensor:
    """Of KL(student ‖ teacher) over texts, by enumeration and autograd."""
    model, teacher = table(0).requires_grad_(), table(1)
    found = torch.zeros((), dtype=torch.float64)
    for text in TEXTS:
        q, p = log_probs(model, text).sum(), log_probs(teacher, text).sum()
        found = found + q.exp() * (q - p)
    return torch.autograd.grad(found, model)[0]


def test_the_expected_gradient_is_that_of_the_divergence_between_texts() -> None:
    plain = MiniLLM(mix=0, length_normalised=False, pretraining=0)
    torch.testing.assert_close(expected_gradient(plain), true_gradient(), atol=1e-12, rtol=0)


def test_a_reward_counted_twice_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the token's own reward in R, next to the exact single-step part, the gradient is another one."""
    after = "llmcompress.training.objectives.minillm._after"
    monkeypatch.setattr(after, lambda values_BT: values_BT.flip(1).cumsum(1).flip(1))
    plain = MiniLLM(mix=0, length_normalised=False, pretraining=0)
    assert (expected_gradient(plain) - true_gradient()).abs().max() > 0.05


def test_importance_weights_undo_the_teachers_share_in_the_sampling_of_the_first_token() -> None:
    """Per-token weights are exact for a text's first token, whose single-step part looks at nothing before it."""
    teacher, model = table(1), table(0)
    q, p = model[0].softmax(-1), teacher[0].softmax(-1)
    weights = importance_weights(q.log(), p.log(), 0.2)
    torch.testing.assert_close((0.2 * p + 0.8 * q) * weights, q, atol=1e-15, rtol=0)
    assert torch.equal(importance_weights(q.log(), p.log(), 0.0), torch.ones(VOCABULARY, dtype=torch.float64))


def test_weights_and_length_normalisation_are_the_formula() -> None:
    mix = 0.3
    model, teacher = table(0).requires_grad_(), table(1)
    for text in TEXTS[:7]:
        q, p = log_probs(model, text), log_probs(teacher, text)
        slow = torch.zeros((), dtype=torch.float64)
        for t in range(LENGTH):
            rows = [each[context(text[:t])].log_softmax(-1) for each in (model, teacher)]
            weight = (q[t].exp() / (mix * p[t].exp() + (1 - mix) * q[t].exp())).detach()
            later = (p - q)[t + 1 :].detach()
            mean = later.mean() if len(later) else 0.0
            slow = slow + weight * ((rows[0].exp() * (rows[0] - rows[1])).sum() - mean * q[t])
        objective = MiniLLM(mix=mix, pretraining=0)
        expected = torch.autograd.grad(slow, model)[0]
        for rows_at_once in (100, 2):  # in one piece, and in parts
            found = torch.autograd.grad(loss_of(objective, model, teacher, text, rows_at_once), model)[0]
            torch.testing.assert_close(found, expected, atol=1e-6 if rows_at_once == 2 else 1e-12, rtol=0)


def test_given_text_has_plain_cross_entropy_beside_it() -> None:
    model, teacher = table(0).requires_grad_(), table(1)
    seen = torch.arange(4)[:, None]
    batch = Batch(
        torch.zeros(2, 2, dtype=torch.long), torch.tensor([[0, 1], [2, 0]]), generated_B=torch.tensor([True, False])
    )
    student = Predictions(seen, lambda values: model[values[:, 0]])
    said = TeacherPredictions(seen, lambda values: teacher[values[:, 0]])
    inputs = ObjectiveInputs(1, batch, student, said, 4)
    parts = [
        torch.autograd.grad(MiniLLM(mix=0, pretraining=factor).loss(inputs), model)[0] for factor in (0.0, 1.0, 3.0)
    ]
    entropy = -(model[2].log_softmax(-1)[2] + model[3].log_softmax(-1)[0]) / 4
    text = torch.autograd.grad(entropy, model)[0]
    torch.testing.assert_close(parts[1] - parts[0], text)
    torch.testing.assert_close(parts[2] - parts[0], 3 * text)
