"""Teachers that learn along or lie inside the student: mutual learning, exits; and perturbed inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.numerics import loss
from llmcompress.training.data.base import Windows
from llmcompress.training.loop import train
from llmcompress.training.objectives.adversarial import Adversarial
from llmcompress.training.objectives.base import Objective
from llmcompress.training.objectives.combined import Combined
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.objectives.exits import Exits
from llmcompress.training.objectives.kl import KL
from llmcompress.training.objectives.mutual import Mutual
from llmcompress.training.settings import Training
from llmcompress.training.step import Step
from llmcompress.training.teacher import ModelTeacher
from tests.families import VOCABULARY, tiny_model, tiny_tokens

CPU = torch.device("cpu")
SETTINGS = Training(steps=3, batch=4, learning_rate=1e-3)


def trained(family: str, objective: Objective, teacher: ModelTeacher | None, seed: int = 0) -> list[Tensor]:
    model = tiny_model(family, seed=seed)
    ids = tiny_tokens(family, batch=8)
    train(model, Windows(ids), SETTINGS, RunContext(ids), objective=objective, teacher=teacher)
    return [each.detach() for each in model.parameters()]


def test_mutual_learning_without_its_divergence_is_two_trainings_side_by_side() -> None:
    peer = tiny_model("llama", seed=1)
    student = trained("llama", Mutual(weight=0.0), ModelTeacher(peer, CPU))
    # gradients are clipped together, so the directions are compared by a training that clips nothing
    alone = trained("llama", CrossEntropy(), None)
    start = list(tiny_model("llama").parameters())
    for together, apart, before in zip(student, alone, start, strict=True):
        torch.testing.assert_close(together - before, apart - before, atol=2e-4, rtol=0.1)
    assert not all(
        torch.equal(a, b) for a, b in zip(peer.parameters(), tiny_model("llama", 1).parameters(), strict=True)
    )
    assert all(each.grad is None for each in peer.parameters())


def test_two_that_learn_together_come_closer_to_each_other() -> None:
    peer, ids = tiny_model("llama", seed=1), tiny_tokens("llama", batch=8)

    def apart(one: Any, other: Any) -> float:
        with torch.no_grad():
            p, q = (each(ids).logits.log_softmax(-1) for each in (one, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    student, before = tiny_model("llama"), apart(tiny_model("llama"), peer)
    train(
        student, Windows(ids), Training(steps=8, batch=4, learning_rate=3e-3), RunContext(ids), objective=Mutual(),
        teacher=ModelTeacher(peer, CPU),
    )  # fmt: skip
    assert apart(student, peer) < before


def test_each_gradient_of_mutual_learning_is_its_own_loss_with_the_other_fixed() -> None:
    ids = tiny_tokens("llama", batch=2)
    batch = next(iter(Windows(ids).loader(_part())))
    student, peer = tiny_model("llama"), tiny_model("llama", seed=1)
    teacher = ModelTeacher(peer, CPU)
    objective = Mutual(weight=0.7)
    objective.begin(student, teacher)
    Step(student, objective, teacher, None, [*student.parameters(), *peer.parameters()])(batch, 1).backward()
    for one, other in ((student, peer), (peer, student)):
        fresh = tiny_model("llama", seed=0 if one is student else 1)
        logits = fresh(batch.ids_BT).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            p = other(batch.ids_BT).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        targets = batch.ids_BT[:, 1:].flatten()
        q = logits.log_softmax(-1)
        (functional.cross_entropy(logits, targets) + 0.7 * (p.exp() * (p - q)).sum(-1).mean()).backward()
        for found, wanted in zip(one.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-4)


def _part() -> Any:
    from llmcompress.training.data.base import BatchRange

    return BatchRange(0, 1, 2, 0)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "opt"])
def test_exits_are_taught_by_the_last_layer_which_is_not_changed_by_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(family), tiny_tokens(family, batch=2)
    batch = next(iter(Windows(ids).loader(_part())))
    objective = Exits(exits=(1,), weight=0.8)
    objective.begin(model, None)
    step = Step(model, objective, None, None, list(model.parameters()))
    found = step(batch, 1)
    found.backward()
    last = [name for name, _ in model.named_parameters() if ".1." in name]  # of the block behind the exit
    assert last and all(model.get_parameter(name).grad is None for name in last)
    with torch.no_grad():
        states = model(batch.ids_BT, output_hidden_states=True)
        exits = objective._readout[0](states.hidden_states[1])
        for module in objective._readout[1:]:
            exits = module(exits)
    p, q = (each[:, :-1].flatten(0, 1).log_softmax(-1) for each in (states.logits, exits))
    targets = batch.ids_BT[:, 1:].flatten()
    wanted = 0.8 * (p.exp() * (p - q)).sum(-1).mean() + 0.2 * functional.nll_loss(q, targets)
    assert float(found.detach()) == pytest.approx(float(wanted), rel=1e-4)
    plain = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * VOCABULARY * 5)
    from llmcompress.training.head import find_head

    Step(model, objective, None, find_head(model, batch.ids_BT), list(model.parameters()))(batch, 1).backward()
    for name, grad in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, atol=1e-6, rtol=1e-4, msg=name)


def test_an_exit_that_there_is_not_is_refused() -> None:
    with pytest.raises(CompressError) as caught:
        Exits(exits=(7,)).begin(tiny_model("llama"), None)
    assert caught.value.code == "training.exits"


def test_the_perturbation_stays_within_its_radius_and_confuses_more_than_chance() -> None:
    student, ids = tiny_model("llama"), tiny_tokens("llama", batch=2)
    batch = next(iter(Windows(ids).loader(_part())))
    teacher = ModelTeacher(tiny_model("llama", seed=1), CPU)
    seen: list[Tensor] = []

    class Watched(Adversarial):
        def _divergence(self, inputs: Any, change_BTD: Tensor) -> Tensor:
            seen.append(change_BTD.detach())
            return super()._divergence(inputs, change_BTD)

    def value(objective: Objective, step: int = 1) -> float:
        objective.begin(student, teacher)
        torch.manual_seed(0)
        return float(Step(student, objective, teacher, None, list(student.parameters()))(batch, step).detach())

    adversarial = value(Watched(radius=0.3, steps=3))
    norm = float(student.get_input_embeddings()(batch.ids_BT).detach().square().sum(-1).mean().sqrt())
    assert len(seen) == 4 and all(float(each.norm(dim=-1).max()) <= 0.3 * norm * 1.0001 for each in seen)
    clean = value(KL())
    assert adversarial > clean
    assert value(Adversarial(radius=1e-6)) == pytest.approx(clean, rel=1e-4)
    assert value(Adversarial(radius=0.3), step=0) == pytest.approx(clean, rel=1e-6), "validation perturbs nothing"
    with torch.no_grad():
        assert float(student(batch.ids_BT).logits.sum()) == float(tiny_model("llama")(batch.ids_BT).logits.sum())


def test_a_training_on_perturbed_inputs_lowers_the_divergence_from_the_teacher() -> None:
    teacher = ModelTeacher(tiny_model("llama", seed=1), CPU)
    after = trained("llama", Combined([KL(), Adversarial()]), teacher)
    before = list(tiny_model("llama").parameters())
    assert not any(torch.isnan(each).any() for each in after)
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
