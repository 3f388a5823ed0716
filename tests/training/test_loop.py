"""Laws of the training loop: deterministic, resumable, zeros stay, only what is asked for is trained."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.numerics import loss
from llmcompress.numerics.loss import next_token_loss
from llmcompress.training.batches import Batches, held_out
from llmcompress.training.checkpoint import Checkpoint
from llmcompress.training.loop import Forward, train
from llmcompress.training.masks import ZerosStay
from llmcompress.training.optimizer import ParameterGroup
from llmcompress.training.settings import Training
from tests.families import FAMILIES, tiny_model, tiny_tokens

CPU = torch.device("cpu")
FEW = Training(steps=6, batch=4, learning_rate=1e-2)


def windows(family: str = "llama", count: int = 10) -> torch.Tensor:
    return tiny_tokens(family, batch=count, length=12)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def sparse_model(family: str) -> PreTrainedModel:
    """Every matrix but the embedding half zeros."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(5)
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    with torch.no_grad():
        for each in model.parameters():
            if each.dim() > 1 and id(each) not in embeddings:
                each.mul_(torch.rand(each.shape, generator=generator) < 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_exact_zeros_stay_exact_zeros(family: str) -> None:
    model = sparse_model(family)
    before = weights(model)
    report = train(model, windows(family), FEW.model_copy(update={"weight_decay": 0.1}), device=CPU)
    assert report.losses[-1] < report.losses[0] and report.steps == 6
    zeros = 0
    for name, after in weights(model).items():
        if after.dim() > 1:
            assert (after[before[name] == 0] == 0).all(), name
            zeros += int((before[name] == 0).sum())
    assert zeros > 1000


def test_one_step_equals_adamw_by_hand() -> None:
    """AdamW with bias correction first moves by rate × g/(|g| + eps), g the gradient of the mean over both batches."""
    settings = Training(
        steps=1, batch=2, gradient_accumulation=2, learning_rate=1e-3, schedule="constant", warmup=0, max_grad_norm=1e9
    )
    model = tiny_model("llama").double()
    by_hand = copy.deepcopy(model)
    ids = windows()
    train(model, ids, settings, device=CPU, seed=3)
    order = Batches(ids, batch=4, seed=3)[0]
    logits = by_hand(input_ids=order).logits[:, :-1]
    functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), order[:, 1:].reshape(-1)).backward()
    for (name, after), parameter in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert parameter.grad is not None
        grad = parameter.grad
        # the loss of the loop is in float32
        torch.testing.assert_close(
            after[grad.abs() > 1e-5], (parameter - 1e-3 * grad / (grad.abs() + 1e-8))[grad.abs() > 1e-5],
            atol=2e-6, rtol=0, msg=name,
        )  # fmt: skip


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 7)  # the state of the global generator must not matter
        model = tiny_model("llama")
        train(model, windows(), FEW, device=CPU, seed=seed)
        return weights(model)

    assert same(trained(0), trained(0))
    assert not same(trained(0), trained(1))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train(tiny_model("llama"), windows(), FEW, device=CPU)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_killed_and_resumed_equals_uninterrupted(family: str, tmp_path: Path) -> None:
    """With dropout, so that the random state matters too."""
    whole = tiny_model(family).train()
    report = train(whole, windows(family), FEW, device=CPU, seed=2)

    class Killed(Exception):
        pass

    def die(step: int) -> None:
        if step == 5:
            raise Killed

    keep = Checkpoint(tmp_path / "state.safetensors", every=2)
    with pytest.raises(Killed):
        train(tiny_model(family).train(), windows(family), FEW, device=CPU, seed=2, checkpoint=keep, after_step=die)
    steps: list[int] = []
    resumed = tiny_model(family).train()
    again = train(
        resumed, windows(family), FEW, device=CPU, seed=2, checkpoint=keep, after_step=lambda step: steps.append(step)
    )
    assert steps == [5, 6] and again == report
    assert same(weights(whole), weights(resumed))
    finished = tiny_model(family).train()
    train(finished, windows(family), FEW, device=CPU, seed=2, checkpoint=keep, after_step=die)
    assert same(weights(whole), weights(finished)), "a finished training is restored, not repeated"


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    keep = Checkpoint(tmp_path / "state.safetensors", every=2)
    train(tiny_model("llama"), windows(), FEW, device=CPU, seed=1, checkpoint=keep)
    expected = tiny_model("llama")
    train(expected, windows(), FEW, device=CPU, seed=2)
    other = tiny_model("llama")
    train(other, windows(), FEW, device=CPU, seed=2, checkpoint=keep)
    assert same(weights(other), weights(expected))
    keep.path.write_bytes(keep.path.read_bytes()[:100])
    damaged = tiny_model("llama")
    train(damaged, windows(), FEW, device=CPU, seed=2, checkpoint=keep)
    assert same(weights(damaged), weights(expected))


def test_only_the_given_parameters_move_and_flags_come_back() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = weights(model)
    chosen = model.model.layers[0].mlp.down_proj.weight
    train(model, windows(), FEW, device=CPU, parameters=[chosen])
    moved = {name for name, after in weights(model).items() if not torch.equal(after, before[name])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    assert not model.lm_head.weight.requires_grad and chosen.requires_grad
    assert all(each.grad is None for each in model.parameters())


def test_a_group_has_its_own_learning_rate() -> None:
    def moved(rate: float | None) -> float:
        model = tiny_model("llama")
        chosen = model.model.layers[0].mlp.down_proj.weight
        before = chosen.detach().clone()
        train(model, windows(), FEW, device=CPU, parameters=[ParameterGroup((chosen,), learning_rate=rate)])
        return float((chosen.detach() - before).abs().max())

    assert moved(None) == moved(1e-2) and moved(1e-4) < 0.1 * moved(1e-2)


def test_the_extra_loss_is_added_and_may_train_parameters_outside_the_model() -> None:
    outside = nn.Parameter(torch.ones(3))

    def pull(forward: Forward) -> torch.Tensor:
        assert forward.logits_BTV.shape[:2] == forward.ids_BT.shape
        return outside.square().sum()

    model = tiny_model("llama")
    plain = train(copy.deepcopy(model), windows(), FEW, device=CPU)
    report = train(model, windows(), FEW, device=CPU, parameters=[outside], extra_loss=pull)
    assert report.losses[0] == pytest.approx(plain.losses[0] + 3.0, abs=1e-5)
    assert float(outside.detach().abs().max()) < 1


def test_a_zero_matrix_that_must_grow_is_trained_with_masks_of_ones_own() -> None:
    model = tiny_model("llama")
    down = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        down.zero_()
    train(model, windows(), FEW, device=CPU, parameters=[down])
    assert int(torch.count_nonzero(down)) == 0
    train(model, windows(), FEW, device=CPU, parameters=[down], masks=ZerosStay([]))
    assert int(torch.count_nonzero(down)) > 0.9 * down.numel()


def test_after_step_can_end_the_training() -> None:
    report = train(tiny_model("llama"), windows(), FEW, device=CPU, after_step=lambda step: step == 2)
    assert report.steps == 2 and report.tokens == 2 * 4 * 11


def test_a_diverged_training_says_what_to_try() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(CompressError) as caught:
        train(model, windows(), FEW, device=CPU)
    assert caught.value.code == "training.not-finite" and "learning_rate: 0.001" in caught.value.fix


def test_validation_windows_are_never_trained_on() -> None:
    ids = windows(count=10)
    training, validation = held_out(ids, share=0.3, seed=4)
    rows = {tuple(row.tolist()) for row in training}, {tuple(row.tolist()) for row in validation}
    assert len(rows[0]) == 7 and len(rows[1]) == 3 and not rows[0] & rows[1]
    model = tiny_model("llama")
    with torch.no_grad():
        expected = float(next_token_loss(model(input_ids=validation).logits, validation))
    settings = FEW.model_copy(update={"validation": 0.3, "batch": 2})
    report = train(model, ids, settings, device=CPU, seed=4)
    assert report.validation_before == pytest.approx(expected, rel=1e-5)
    assert report.validation_after is not None and report.validation_after != report.validation_before


def test_a_batch_in_parts_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a large vocabulary: as many windows at once as fit, gradients of the whole batch."""
    whole, parted = tiny_model("llama"), tiny_model("llama")
    settings = FEW.model_copy(update={"gradient_accumulation": 2, "validation": 0.3})
    once = train(whole, windows(), settings, device=CPU)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 1)
    seen: set[int] = set()
    parted.register_forward_pre_hook(lambda _, __, given: seen.add(len(given["input_ids"])), with_kwargs=True)
    again = train(parted, windows(), settings, device=CPU)
    assert seen == {1}
    assert again.losses == pytest.approx(once.losses, rel=1e-4) and again.tokens == once.tokens
    assert again.validation_after == pytest.approx(once.validation_after, rel=1e-4)


def test_every_window_is_seen_once_per_pass_over_the_data() -> None:
    ids = windows(count=10)
    batches = Batches(ids, batch=4, seed=1)
    seen = torch.cat([batches[number] for number in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(ids.tolist()) and sorted(seen[10:]) == sorted(ids.tolist())
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_no_step_is_wasted_at_a_learning_rate_of_zero(name: Any) -> None:
    model = tiny_model("llama")
    before = [weights(model)]
    train(
        model, windows(), FEW.model_copy(update={"schedule": name, "warmup": 0.5}), device=CPU,
        after_step=lambda _: before.append(weights(model)),
    )  # fmt: skip
    assert not any(same(a, b) for a, b in itertools.pairwise(before))


def test_bfloat16_keeps_weights_in_float32() -> None:
    model = tiny_model("llama")
    report = train(model, windows(), FEW.model_copy(update={"bfloat16": True}), device=CPU)
    assert report.losses[-1] < report.losses[0]
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_started_late_it_sees_the_batches_and_rates_of_the_later_steps() -> None:
    seen: list[list[torch.Tensor]] = [[], []]

    def note(into: list[torch.Tensor]) -> Any:
        def add(forward: Forward) -> torch.Tensor:
            into.append(forward.ids_BT)
            return torch.zeros(())

        return add

    train(tiny_model("llama"), windows(), FEW, device=CPU, extra_loss=note(seen[0]))
    report = train(tiny_model("llama"), windows(), FEW, device=CPU, extra_loss=note(seen[1]), start=4)
    assert report.steps == 2
    assert all(torch.equal(a, b) for a, b in zip(seen[0][4:], seen[1], strict=True))
