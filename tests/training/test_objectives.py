"""Objectives: equal to their textbook forms, computed in parts, with a teacher that is loaded when it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.numerics import loss
from llmcompress.progress import Silent
from llmcompress.training.data.base import Windows
from llmcompress.training.data.batch import IGNORED, Batch, Sample, padded
from llmcompress.training.head import find_head
from llmcompress.training.loop import train
from llmcompress.training.objectives.base import OBJECTIVES, Objective, TokenObjective
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.objectives.jsd import JSD
from llmcompress.training.objectives.kl import KL
from llmcompress.training.objectives.skew_kl import SkewKL
from llmcompress.training.objectives.total_variation import TotalVariation
from llmcompress.training.settings import Training
from llmcompress.training.step import Step
from llmcompress.training.teacher import ModelTeacher
from tests.families import VOCABULARY, tiny_model, tiny_tokens

CPU = torch.device("cpu")


def batch(family: str, length: int = 12) -> Batch:
    """Samples of several lengths, half of their tokens learned."""
    ids = tiny_tokens(family, batch=3, length=length)
    learned = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return padded(
        [
            Sample(row[: length - 3 * i], mask[: length - 3 * i])
            for i, (row, mask) in enumerate(zip(ids, learned, strict=True))
        ]
    )


def at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * VOCABULARY * rows)


def shifted(_: Any, __: Any, out: Any) -> Any:
    """A forward hook: the model does more to its logits than a scale or a cap."""
    out["logits"] = out.logits + torch.arange(VOCABULARY) / 100
    return out


def gradients(family: str, objective: Objective, *, chunked: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model, teacher = tiny_model(family), ModelTeacher(tiny_model(family, seed=1), CPU)
    seen = batch(family)
    head = find_head(model, seen.ids_BT) if chunked else None
    assert (head is not None) == chunked
    found = Step(model, objective, teacher, head, list(model.parameters()))(seen, 1)
    found.backward()
    return float(found.detach()), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", ["llama_gqa", "gemma2", "cohere", "opt"])
@pytest.mark.parametrize(
    "objective",
    [CrossEntropy(), KL(temperature=2.0, weight=0.7), KL(direction="reverse"), JSD(), SkewKL(), TotalVariation()],
    ids=repr,
)
def test_a_loss_in_parts_and_its_gradient_equal_the_whole_one(
    family: str, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 caps its logits, Cohere scales them, both tie the head to the embedding."""
    value, plain = gradients(family, objective, chunked=False)
    at_once(monkeypatch, rows=5)
    parted, grads = gradients(family, objective, chunked=True)
    assert parted == pytest.approx(value, rel=1e-5)
    for name, grad in plain.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-8, rtol=1e-5, msg=name)


class Rows(TorchDispatchMode):
    """The most rows that any tensor of logits has, in any operation."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor) and each.dim() > 1 and each.shape[-1] == VOCABULARY:
                # a view that repeats the head's weight takes no memory
                numbers = min(each.numel(), each.untyped_storage().nbytes() // each.element_size())
                self.most = max(self.most, numbers // VOCABULARY)
        return out


@pytest.mark.parametrize("objective", [CrossEntropy(), KL()], ids=repr)
def test_logits_exist_for_a_bounded_number_of_tokens_forward_and_backward(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny_tokens("llama", batch=8, length=24)  # 192 rows; the transposed head itself has 64
    found = {}
    for limit in (1000, 70):
        at_once(monkeypatch, limit)
        kept: list[int] = []
        teacher = ModelTeacher(tiny_model("llama", seed=1), CPU)

        def note(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            if tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                kept.append(tensor.numel() // VOCABULARY)
            return tensor

        with Rows() as rows, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train(
                tiny_model("llama"), Windows(ids), Training(steps=1, batch=8), RunContext(ids), objective=objective,
                teacher=teacher,
            )  # fmt: skip
        found[limit] = rows.most, max(kept, default=0)
    assert found[1000][0] == 192 and found[1000][1] == 192
    assert found[70][0] <= 70 and found[70][1] <= 70, "and none is kept for the backward pass"


def test_a_head_that_explains_the_logits_is_found_and_no_other() -> None:
    model = tiny_model("llama")
    assert find_head(model, tiny_tokens("llama")) is not None
    handle = model.register_forward_hook(shifted)
    assert find_head(model, tiny_tokens("llama")) is None
    handle.remove()
    model.get_output_embeddings = lambda: None
    assert find_head(model, tiny_tokens("llama")) is None


def test_where_the_head_explains_nothing_whole_samples_go_through_and_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Told(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    ids, settings = tiny_tokens("llama", batch=8), Training(steps=2, batch=4, learning_rate=1e-3, max_grad_norm=1e9)
    found, told, sizes = [], Told(), set[int]()
    for limit in (1000, 24):  # tokens: two samples of twelve
        at_once(monkeypatch, limit)
        model = tiny_model("llama")
        model.register_forward_hook(shifted)
        if limit == 24:
            model.model.register_forward_hook(lambda _, __, out: sizes.add(len(out.last_hidden_state)))
        found.append(train(model, Windows(ids), settings, RunContext(ids, progress=told)).losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(told.notes) == 1 and "2 at a time" in told.notes[0] and 2 in sizes and 4 not in sizes


def test_kl_is_the_divergence_of_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 9, generator=generator).double()
    targets = torch.tensor([1, 2, IGNORED, 4, 5, 6])
    p, q = functional.softmax(teacher / 2, -1), functional.softmax(student / 2, -1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    entropy = -functional.log_softmax(student, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy[targets == IGNORED] = 0
    torch.testing.assert_close(KL(temperature=2.0).per_token(student, targets, teacher), 4 * forward)
    torch.testing.assert_close(
        KL(temperature=2.0, direction="reverse").per_token(student, targets, teacher), 4 * reverse
    )
    mixed = KL(temperature=2.0, weight=0.25).per_token(student, targets, teacher)
    torch.testing.assert_close(mixed, 0.25 * 4 * forward + 0.75 * entropy)


def test_a_teacher_is_loaded_once_when_it_is_first_asked_and_stays_as_it_is() -> None:
    loaded: list[Any] = []

    def load() -> Any:
        loaded.append(tiny_model("llama", seed=1, dtype=torch.bfloat16).train())
        return loaded[-1]

    ids, settings = tiny_tokens("llama", batch=8), Training(steps=3, batch=4, learning_rate=1e-2)
    teacher = ModelTeacher(load, CPU)
    train(tiny_model("llama"), Windows(ids), settings, RunContext(ids), objective=CrossEntropy(), teacher=teacher)
    assert not loaded
    report = train(tiny_model("llama"), Windows(ids), settings, RunContext(ids), objective=KL(), teacher=teacher)
    assert len(loaded) == 1 and report.losses[-1] < report.losses[0]
    assert not loaded[0].training and loaded[0].dtype == torch.bfloat16
    assert all(each.grad is None and not each.requires_grad for each in loaded[0].parameters())
    before = tiny_model("llama", seed=1, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(each, before[name]) for name, each in loaded[0].state_dict().items())


def test_a_teacher_computes_in_its_own_dtype_whatever_the_students_precision() -> None:
    found: list[torch.Tensor] = []

    class Look(TokenObjective):
        def needs_teacher(self) -> bool:
            return True

        def per_token(self, student_RV: Any, targets_R: Any, teacher: Any) -> Any:
            found.extend([student_RV.detach(), teacher])
            return student_RV.square().sum(-1)

    ids, settings = tiny_tokens("llama", batch=2), Training(steps=1, batch=2, mixed_precision="bf16")
    given = {"objective": Look(), "teacher": ModelTeacher(tiny_model("llama", seed=1), CPU)}
    train(tiny_model("llama"), Windows(ids), settings, RunContext(ids, seed=1), **given)
    plain = tiny_model("llama", seed=1)(input_ids=ids).logits.detach()
    in_order = [torch.equal(found[1].view_as(plain), plain[list(order)]) for order in ((0, 1), (1, 0))]
    assert any(in_order) and found[0].dtype == torch.float32
    assert torch.equal(found[0], found[0].bfloat16().float()), "the student's are numbers of bfloat16"


def test_a_model_does_not_diverge_from_itself() -> None:
    ids, model = tiny_tokens("llama", batch=4), tiny_model("llama")
    report = train(
        model, Windows(ids), Training(steps=1, batch=4), RunContext(ids), objective=KL(),
        teacher=ModelTeacher(tiny_model("llama"), CPU),
    )  # fmt: skip
    assert report.losses[0] == pytest.approx(0, abs=1e-6)


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    ids, settings = tiny_tokens("llama", batch=4), Training(steps=1, batch=4)
    with pytest.raises(CompressError) as caught:
        train(tiny_model("llama"), Windows(ids), settings, RunContext(ids), objective=KL())
    assert caught.value.code == "training.no-teacher"
    teacher = ModelTeacher(tiny_model("llama_odd"), CPU)
    with pytest.raises(CompressError) as caught:
        train(tiny_model("llama"), Windows(ids), settings, RunContext(ids), objective=KL(), teacher=teacher)
    assert caught.value.code == "training.vocabulary" and "131" in caught.value.what


def test_objectives_are_found_by_name() -> None:
    assert {"cross_entropy", "kl"} <= set(OBJECTIVES)
    with pytest.raises(CompressError, match="kl"):
        OBJECTIVES["k1"]
