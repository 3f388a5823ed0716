"""Laws of the training loop: deterministic, resumable, zeros stay, only what is asked for is trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.numerics.loss import next_token_loss
from llmcompress.progress import Silent
from llmcompress.training.data.base import BatchRange, SampleOrder, Windows, held_out
from llmcompress.training.job import Callback, Job
from llmcompress.training.loop import train
from llmcompress.training.masks import ZerosStay
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.objectives.penalty import Penalised, Penalty
from llmcompress.training.optimizer import ParameterGroup, adamw
from llmcompress.training.session import TrainingReport
from llmcompress.training.settings import Training
from tests.families import FAMILIES, tiny_model, tiny_tokens

FEW = Training(steps=6, batch=4, learning_rate=1e-2)


def windows(family: str = "llama", count: int = 10) -> torch.Tensor:
    return tiny_tokens(family, batch=count, length=12)


class KeptIn:
    """The one thing that a training asks of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def training_file(self, stage: int, name: str) -> Path:
        return self.folder / f"{stage}-{name}.safetensors"


class Each(Callback):
    """Calls a function after every step."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def after_step(self, step: int) -> bool:
        return bool(self.call(step))


def run(
    model: PreTrainedModel, ids: torch.Tensor, settings: Training, *, after: Any = None, **given: Any
) -> TrainingReport:
    """`given`: fields of the context and of the job, or an objective."""
    context = {name: given.pop(name) for name in ("seed", "keep") if name in given}
    objective = given.pop("objective", None)
    job = Job(callback=after and Each(after), **given)
    return train(model, Windows(ids), settings, RunContext(ids, **context), objective=objective, job=job)


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
    report = run(model, windows(family), FEW.model_copy(update={"weight_decay": 0.1}))
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
    run(model, ids, settings, seed=3)
    order = ids[next(iter(SampleOrder(len(ids), BatchRange(0, 1, 4, seed=3))))]
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


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_a_step_moves_what_is_trained_wherever_it_lies(layout: str) -> None:
    """Parts of larger tensors, as factors of a lower rank are: each number by the rate, those beside it not at all."""
    whole = torch.zeros(6, 8)
    parameter = nn.Parameter(whole[:, :3] if layout == "sliced" else whole.T)
    optimizer = adamw([{"params": [parameter]}], FEW.model_copy(update={"learning_rate": 0.1, "weight_decay": 0.0}))
    parameter.grad = torch.ones(parameter.shape)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full(parameter.shape, -0.1))
    if layout == "sliced":
        assert (whole[:, 3:] == 0).all()


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 7)  # the state of the global generator must not matter
        model = tiny_model("llama")
        run(model, windows(), FEW, seed=seed)
        return weights(model)

    assert same(trained(0), trained(0))
    assert not same(trained(0), trained(1))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(tiny_model("llama"), windows(), FEW)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_killed_and_resumed_equals_uninterrupted(family: str, tmp_path: Path) -> None:
    """With dropout, so that the random state matters too."""
    settings = FEW.model_copy(update={"save_every": 2, "gradient_accumulation": 2, "validation": 0.2})
    whole = tiny_model(family).train()
    report = run(whole, windows(family), settings, seed=2)

    class Killed(Exception):
        pass

    def die(step: int) -> None:
        if step == 5:
            raise Killed

    keep = KeptIn(tmp_path)
    with pytest.raises(Killed):
        run(tiny_model(family).train(), windows(family), settings, seed=2, keep=keep, after=die)
    steps: list[int] = []
    resumed = tiny_model(family).train()
    again = run(resumed, windows(family), settings, seed=2, keep=keep, after=steps.append)
    assert steps == [5, 6] and again == report
    assert same(weights(whole), weights(resumed))
    finished = tiny_model(family).train()
    run(finished, windows(family), settings, seed=2, keep=keep, after=die)
    assert same(weights(whole), weights(finished)), "a finished training is restored, not repeated"


def test_a_state_of_another_training_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    keep = KeptIn(tmp_path)
    run(tiny_model("llama"), windows(), FEW, seed=1, keep=keep)
    for changed in (
        {"seed": 2},
        {"seed": 1, "model": 1},
        {"seed": 1, "objective": Penalised(CrossEntropy(), Nothing())},
    ):
        model_seed = changed.pop("model", 0)
        steps: list[int] = []
        expected, other = tiny_model("llama", seed=model_seed), tiny_model("llama", seed=model_seed)
        run(expected, windows(), FEW, **changed)
        run(other, windows(), FEW, keep=keep, after=steps.append, **changed)
        assert len(steps) == 6 and same(weights(other), weights(expected))
    file = keep.training_file(0, "train")
    file.write_bytes(file.read_bytes()[:100])
    damaged, expected = tiny_model("llama"), tiny_model("llama")
    run(damaged, windows(), FEW, seed=1, keep=keep)
    run(expected, windows(), FEW, seed=1)
    assert same(weights(damaged), weights(expected))


def test_a_diverged_training_goes_back_to_what_was_saved_and_says_so(tmp_path: Path) -> None:
    settings = FEW.model_copy(update={"save_every": 2})
    keep, saved = KeptIn(tmp_path), list[dict[str, torch.Tensor]]()
    model = tiny_model("llama")

    def poison(step: int) -> None:
        saved.append(weights(model))
        if step == 5:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("inf"))

    with pytest.raises(CompressError) as caught:
        run(model, windows(), settings, keep=keep, after=poison)
    assert caught.value.code == "training.not-finite" and "after step 4" in caught.value.saved
    assert same(weights(model), saved[3])


@pytest.mark.parametrize("killed", [False, True])
def test_with_validation_a_diverged_training_goes_back_to_its_best_weights(killed: bool, tmp_path: Path) -> None:
    """The rate is so high that validation soon gets worse: what was saved last is not the best."""
    settings = FEW.model_copy(update={"steps": 8, "save_every": 1, "validation": 0.3, "learning_rate": 0.3})
    model, seen = tiny_model("llama"), list[dict[str, torch.Tensor]]()

    class Killed(Exception):
        pass

    def after(step: int) -> None:
        seen.append(weights(model))
        if killed and len(seen) == 5:
            raise Killed
        if step == 6:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("inf"))

    keep = KeptIn(tmp_path)
    start = weights(model)
    if killed:
        with pytest.raises(Killed):
            run(model, windows(count=10), settings, keep=keep, after=after)
        model.load_state_dict(start)
    with pytest.raises(CompressError) as caught:
        run(model, windows(count=10), settings, keep=keep, after=after)
    assert "step 0 again, the best in validation" in str(caught.value.where)
    assert same(weights(model), start) and not same(seen[-2], start)


def test_only_the_given_parameters_move_and_flags_come_back() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = weights(model)
    chosen = model.model.layers[0].mlp.down_proj.weight
    run(model, windows(), FEW, parameters=[chosen])
    moved = {name for name, after in weights(model).items() if not torch.equal(after, before[name])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    assert not model.lm_head.weight.requires_grad and chosen.requires_grad
    assert all(each.grad is None for each in model.parameters())


def test_a_group_has_its_own_learning_rate() -> None:
    def moved(rate: float | None) -> float:
        model = tiny_model("llama")
        chosen = model.model.layers[0].mlp.down_proj.weight
        before = chosen.detach().clone()
        run(model, windows(), FEW, parameters=[ParameterGroup((chosen,), learning_rate=rate)])
        return float((chosen.detach() - before).abs().max())

    assert moved(None) == moved(1e-2) and moved(1e-4) < 0.1 * moved(1e-2)


class Nothing(Penalty):
    def value(self, step: int) -> torch.Tensor:
        return torch.zeros(())


def test_a_penalty_is_added_and_may_train_parameters_outside_the_model() -> None:
    outside = nn.Parameter(torch.ones(3))

    class Pull(Penalty):
        def value(self, step: int) -> torch.Tensor:
            return outside.square().sum()

    model = tiny_model("llama")
    plain = run(copy.deepcopy(model), windows(), FEW)
    settings = FEW.model_copy(update={"gradient_accumulation": 2})
    report = run(model, windows(), settings, parameters=[outside], objective=Penalised(CrossEntropy(), Pull()))
    assert report.losses[0] == pytest.approx(plain.losses[0] + 3.0, abs=0.1)
    assert float(outside.detach().abs().max()) < 1


def test_a_zero_matrix_that_must_grow_is_trained_with_masks_of_ones_own() -> None:
    model = tiny_model("llama")
    down = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        down.zero_()
    run(model, windows(), FEW, parameters=[down])
    assert int(torch.count_nonzero(down)) == 0
    run(model, windows(), FEW, parameters=[down], masks=ZerosStay([]))
    assert int(torch.count_nonzero(down)) > 0.9 * down.numel()


def test_after_step_can_end_the_training() -> None:
    report = run(tiny_model("llama"), windows(), FEW, after=lambda step: step == 2)
    assert report.steps == 2 and report.tokens == 2 * 4 * 11


def test_a_diverged_training_says_what_to_try() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(CompressError) as caught:
        run(model, windows(), FEW)
    assert caught.value.code == "training.not-finite" and "learning_rate: 0.001" in caught.value.fix


def test_validation_windows_are_never_trained_on() -> None:
    ids = windows(count=10)
    training, validation = (ids[chosen] for chosen in held_out(len(ids), share=0.3, seed=4))
    rows = {tuple(row.tolist()) for row in training}, {tuple(row.tolist()) for row in validation}
    assert len(rows[0]) == 7 and len(rows[1]) == 3 and not rows[0] & rows[1]
    model = tiny_model("llama")
    with torch.no_grad():
        expected = float(next_token_loss(model(input_ids=validation).logits, validation))
    settings = FEW.model_copy(update={"validation": 0.3, "batch": 2})
    report = run(model, ids, settings, seed=4)
    assert report.validation_before == pytest.approx(expected, rel=1e-5)
    assert report.validation_after is not None and report.validation_after != report.validation_before


def test_every_window_is_seen_once_per_pass_over_the_data() -> None:
    ids = windows(count=10)
    seen = [index for batch in SampleOrder(len(ids), BatchRange(0, 5, 4, seed=1)) for index in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_no_step_is_wasted_at_a_learning_rate_of_zero(name: Any) -> None:
    model = tiny_model("llama")
    before = [weights(model)]
    run(
        model, windows(), FEW.model_copy(update={"schedule": name, "warmup": 0.5}),
        after=lambda _: before.append(weights(model)),
    )  # fmt: skip
    assert not any(same(a, b) for a, b in itertools.pairwise(before))


def test_bfloat16_keeps_weights_in_float32() -> None:
    model = tiny_model("llama")
    report = run(model, windows(), FEW.model_copy(update={"mixed_precision": "bf16"}))
    assert report.losses[-1] < report.losses[0]
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_started_late_it_sees_the_batches_and_rates_of_the_later_steps() -> None:
    def seen(**job: Any) -> list[torch.Tensor]:
        model, found = tiny_model("llama"), list[torch.Tensor]()
        model.register_forward_pre_hook(lambda _, __, given: found.append(given["input_ids"]), with_kwargs=True)
        assert run(model, windows(), FEW, **job).steps == 6 - job.get("start", 0)
        return found

    assert all(torch.equal(a, b) for a, b in zip(seen()[4:], seen(start=4), strict=True))


def one_step(**settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = tiny_model("llama")
    before = weights(model)
    run(model, windows(), Training(**{"steps": 1, "batch": 4, "schedule": "constant", "warmup": 0, **settings}))
    return before, weights(model)


def test_weight_decay_shrinks_matrices_and_leaves_vectors() -> None:
    before, plain = one_step(learning_rate=1e-3)
    _, decayed = one_step(learning_rate=1e-3, weight_decay=0.5)
    for name, weight in before.items():
        gone = plain[name] - decayed[name]
        expected = 1e-3 * 0.5 * weight if weight.dim() > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(gone, expected, atol=2e-7, rtol=0, msg=name)


def test_gradient_clipping_bounds_the_norm_of_the_gradient() -> None:
    norms: dict[float, float] = {}
    for limit in (1e9, 1e-2):

        class Norm(ZerosStay):
            def __init__(self, model: PreTrainedModel, limit: float) -> None:
                self.model, self.limit = model, limit

            def before_step(self, step: int, optimizer: Any) -> None: ...

            def after_step(self, step: int, optimizer: Any) -> None:
                # the first moment is (1 - β₁) · gradient after the first step
                moments = [optimizer.state[each]["exp_avg"] / 0.1 for each in self.model.parameters()]
                norms[self.limit] = float(torch.stack([each.norm() for each in moments]).norm())

            def state(self) -> dict[str, torch.Tensor]:
                return {}

        model = tiny_model("llama")
        settings = Training(steps=1, batch=4, max_grad_norm=limit)
        run(model, windows(), settings, masks=Norm(model, limit))
    assert norms[1e9] > 1 and norms[1e-2] == pytest.approx(1e-2, rel=1e-3)


def with_few_zeros() -> PreTrainedModel:
    """As a dense checkpoint has them."""
    model = tiny_model("llama")
    with torch.no_grad():
        for each in model.parameters():
            if each.dim() > 1:
                each[0, 3], each[-1, 0] = 0.0, -0.0
    return model


@pytest.mark.parametrize("made", [lambda: sparse_model("llama"), with_few_zeros], ids=["pruned", "few"])
def test_gradients_of_zeros_enter_neither_the_norm_nor_the_moments(made: Callable[[], PreTrainedModel]) -> None:
    model = made()
    pruned = {name: each == 0 for name, each in model.named_parameters() if each.dim() > 1}
    seen: list[bool] = []

    class Look(ZerosStay):
        def before_step(self, step: int, optimizer: Any) -> None:
            super().before_step(step, optimizer)
            grads = {name: each.grad for name, each in model.named_parameters()}
            seen.append(all(bool((grads[name][zero] == 0).all()) for name, zero in pruned.items()))

        def after_step(self, step: int, optimizer: Any) -> None:
            super().after_step(step, optimizer)
            parameters = dict(model.named_parameters())
            moments = {name: optimizer.state[parameters[name]] for name in pruned}
            seen.extend(bool((moments[name]["exp_avg_sq"][zero] == 0).all()) for name, zero in pruned.items())

    run(model, windows(), FEW, masks=Look(model.parameters()))
    assert seen and all(seen)
    for name, each in model.named_parameters():
        if name in pruned:
            assert bool((each[pruned[name]] == 0).all()) and not bool(each[pruned[name]].signbit().any()), name


def test_accumulated_pieces_have_the_gradient_and_the_loss_of_one_batch() -> None:
    """AdamW divides by the gradient's size, so weights alone would not tell a sum from a mean."""

    class Grads(ZerosStay):
        def before_step(self, step: int, optimizer: Any) -> None:
            self.found = [each.grad.clone() for group in optimizer.param_groups for each in group["params"]]

    found = []
    for pieces in ({"batch": 6}, {"batch": 2, "gradient_accumulation": 3}):
        masks = Grads([])
        report = run(tiny_model("llama"), windows(), Training(steps=1, **pieces), masks=masks)
        found.append((masks.found, report))
    for once, added in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(added, once, atol=1e-5, rtol=1e-4)
    assert found[1][1].losses == pytest.approx(found[0][1].losses, rel=1e-5)
    assert found[1][1].tokens == found[0][1].tokens == 6 * 11


@pytest.mark.parametrize("family", ["llama_gqa", "gemma2"])
def test_gradient_checkpointing_changes_no_weight_and_keeps_less(family: str) -> None:
    found = []
    for wanted in (False, True):
        model, kept = tiny_model(family), [0]

        def count(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept[0] += tensor.numel()
            return tensor

        settings = FEW.model_copy(update={"steps": 2, "gradient_checkpointing": wanted})
        names = [name for name, _ in model.named_modules()]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            run(model, windows(family), settings)
        assert [name for name, _ in model.named_modules()] == names
        found.append((weights(model), kept[0]))
    assert same(found[0][0], found[1][0])
    assert found[1][1] < 0.6 * found[0][1]


def test_fp16_without_cuda_is_refused_before_any_work() -> None:
    with pytest.raises(CompressError) as caught:
        run(tiny_model("llama"), windows(), FEW.model_copy(update={"mixed_precision": "fp16"}))
    assert caught.value.code == "training.fp16" and "bf16" in caught.value.fix


def test_progress_tells_the_loss_and_how_many_of_all_steps_are_done() -> None:
    class Told(Silent):
        def __init__(self) -> None:
            self.texts: list[str] = []
            self.done: list[tuple[int, int]] = []

        def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
            self.texts.append(text)
            self.done.append((done, total))

    told = Told()
    train(tiny_model("llama"), Windows(windows()), FEW, RunContext(windows(), progress=told), job=Job("recover"))
    assert len(told.texts) == 6 and told.texts[0].startswith("recover: step 1/6, loss ")
    assert told.done == [(step, 6) for step in range(1, 7)]
