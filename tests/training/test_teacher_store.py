"""Stored distributions: what they estimate, what they take, and what a kill or a damaged file does to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.progress import Silent
from llmcompress.training import teacher_store
from llmcompress.training.data.base import Windows
from llmcompress.training.data.batch import Batch, Sample, padded
from llmcompress.training.features import Wanted
from llmcompress.training.loop import train
from llmcompress.training.objectives.divergence import Divergence
from llmcompress.training.objectives.jsd import JSD
from llmcompress.training.objectives.kl import KL
from llmcompress.training.objectives.skew_kl import SkewKL
from llmcompress.training.objectives.total_variation import TotalVariation
from llmcompress.training.settings import Training
from llmcompress.training.stored_teacher import stored
from llmcompress.training.targets import SampledTokens, TopTokens
from llmcompress.training.teacher import ModelTeacher, TeacherPredictions
from llmcompress.training.teacher_store import Stored, TeacherStore
from tests.families import VOCABULARY, tiny_model, tiny_tokens

CPU = torch.device("cpu")
IDS = tiny_tokens("llama", batch=10, length=6)
DATA = Windows(IDS)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_store, "SAMPLES_PER_SHARD", 4)


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Counting(ModelTeacher):
    """Counts its forward passes, and dies in one of them."""

    def __init__(self, die: int = 10**9) -> None:
        super().__init__(tiny_model("llama", seed=1), CPU)
        self.passes, self._die = 0, die

    def predictions(self, batch: Batch, wanted: Wanted = Wanted()) -> TeacherPredictions:  # noqa: B008
        self.passes += 1
        if self.passes == self._die:
            raise InterruptedError
        return super().predictions(batch, wanted)


def store(folder: Path, progress: Silent | None = None, **changed: object) -> TeacherStore:
    settings = {"form": "sampled", "tokens": 8} | changed
    return TeacherStore(
        settings=Stored.model_validate({"folder": str(folder), **settings}), vocabulary=VOCABULARY, temperature=1.0,
        seed=3, about={"weights": "abc"}, progress=progress or Silent(),
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def two(rows: int = 4, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return student, teacher.log_softmax(-1)


@pytest.mark.parametrize("objective", [KL(), SkewKL(skew=0.2)], ids=repr)
def test_the_gradient_from_sampled_tokens_is_unbiased(objective: Divergence) -> None:
    """A z-test of every component, over many stores; the target of the most likely tokens alone fails it."""
    student, teacher = two()
    targets, draws, kept = torch.zeros(4, dtype=torch.long), 4000, 5
    many = student.repeat(draws, 1).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    ids = torch.multinomial(teacher.exp().repeat(draws, 1), kept, replacement=True, generator=generator)
    rows = SampledTokens(ids, teacher.repeat(draws, 1).gather(-1, ids), 1.0)
    losses = objective.per_token(many, targets.repeat(draws), rows)
    (gradient,) = torch.autograd.grad(losses.sum(), many)

    def z(found: Tensor, expected: Tensor) -> Tensor:
        return (found.mean(0) - expected) / (found.std(0) / draws**0.5)

    whole = student.clone().requires_grad_()
    exact = objective.per_token(whole, targets, teacher)
    (expected,) = torch.autograd.grad(exact.sum(), whole)
    assert z(gradient.view(draws, 4, 7), expected).abs().max() < 4
    assert z(losses.view(draws, 4).detach(), exact.detach()).abs().max() < 4
    if isinstance(objective, KL):  # renormalised, without their tail
        top, index = teacher.topk(kept)
        only = torch.zeros_like(teacher).scatter(-1, index, top.softmax(-1))
        biased = student.softmax(-1) - only
        assert z(gradient.view(draws, 4, 7), biased).abs().max() > 20


@pytest.mark.parametrize(
    "objective", [KL(), KL(direction="reverse"), JSD(), SkewKL(), TotalVariation()], ids=repr
)  # fmt: skip
def test_the_most_likely_tokens_and_their_tail_give_a_lower_bound_that_ends_at_the_divergence(
    objective: Divergence,
) -> None:
    student, teacher = two()
    targets = torch.zeros(4, dtype=torch.long)
    full = objective.per_token(student, targets, teacher)
    before = torch.zeros(4, dtype=torch.float64)
    for kept in range(1, 7):  # at six of seven the tail is one token
        top, ids = teacher.topk(kept)
        tail = teacher.scatter(-1, ids, float("-inf")).logsumexp(-1)
        rows = TopTokens(ids, top, 1.0, tail)
        found = objective.per_token(student.clone().requires_grad_(), targets, rows)
        assert (found <= full + 1e-12).all() and (found >= before - 1e-12).all()
        before = found.detach()
        assert objective.per_token(teacher, targets, rows).abs().max() < 1e-12
    torch.testing.assert_close(before, full)


@pytest.mark.parametrize("form", ["top", "sampled"])
def test_a_training_from_disk_is_the_one_with_the_teacher_in_memory(form: str, tmp_path: Path) -> None:
    """Nearly all of the vocabulary is kept, or many tokens are drawn."""
    settings = Training(steps=3, batch=4, learning_rate=1e-2)
    losses = []
    asked = Counting()
    from_disk = stored(store(tmp_path, form=form, tokens=VOCABULARY - 1 if form == "top" else 4000), asked, DATA)
    passes = asked.passes
    for teacher in (from_disk, Counting()):
        report = train(
            tiny_model("llama"), DATA, settings, RunContext(IDS), objective=KL(), teacher=teacher
        )  # fmt: skip
        losses.append(report.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if form == "top" else 0.1)
    assert asked.passes == passes == 3


def test_samples_are_found_in_any_batch_and_only_where_they_predict(tmp_path: Path) -> None:
    found = stored(store(tmp_path, form="top", tokens=3), Counting(), DATA)
    batch = padded([DATA.sample(7), DATA.sample(2)])
    said = found.predictions(batch, Wanted())
    rows = said.rows(said.values_RX)
    assert isinstance(rows, TopTokens)
    logits = tiny_model("llama", seed=1)(IDS[[7, 2]]).logits.detach()
    expected = functional.log_softmax(logits, -1).topk(3, -1)
    assert torch.equal(rows.ids_RK.view(2, 6, 3)[:, :-1], expected.indices[:, :-1])
    torch.testing.assert_close(rows.log_probs_RK.view(2, 6, 3)[:, :-1], expected.values[:, :-1], atol=4e-3, rtol=0)
    with pytest.raises(CompressError) as caught:
        found.predictions(padded([Sample(IDS[0].flip(0))]), Wanted())
    assert caught.value.code == "training.not-stored"


@pytest.mark.parametrize("form", ["top", "sampled"])
def test_the_bytes_that_are_stated_before_are_those_on_disk(form: str, tmp_path: Path) -> None:
    progress = Noting()
    stored(store(tmp_path, progress, form=form), Counting(), DATA)
    per_token = Stored(folder="x", form=form, tokens=8).bytes_per_token(VOCABULARY)
    assert f"{per_token} bytes per token" in progress.notes[0]
    kept = sum(len(data) for name, data in contents(tmp_path).items() if name.endswith(".safetensors"))
    overhead = 3 * 1000 + 10 * 24  # headers of three files; hash and count of ten samples
    assert per_token * 50 <= kept <= per_token * 50 + overhead
    assert Stored(folder="x", tokens=50).bytes_per_token(151_936) == 304


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    stored(store(tmp_path / "through"), Counting(), DATA)
    with pytest.raises(InterruptedError):
        stored(store(tmp_path / "killed"), Counting(die=2), DATA)
    assert len(contents(tmp_path / "killed")) == 2, "what it is, and the first of three shards"
    again = Counting()
    stored(store(tmp_path / "killed"), again, DATA)
    assert again.passes == 2 and contents(tmp_path / "killed") == contents(tmp_path / "through")
    unused = Counting()
    stored(store(tmp_path / "killed"), unused, DATA)
    assert not unused.passes


def test_a_damaged_shard_is_told_and_computed_again(tmp_path: Path) -> None:
    stored(store(tmp_path), Counting(), DATA)
    before, shard = contents(tmp_path), tmp_path / "00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    progress, teacher = Noting(), Counting()
    stored(store(tmp_path, progress), teacher, DATA)
    assert teacher.passes == 1 and contents(tmp_path) == before
    assert any("00001.safetensors is damaged" in note for note in progress.notes)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    stored(store(tmp_path / "a"), Counting(), DATA)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    for folder, changed, data in (
        ("a", {"tokens": 9}, DATA), ("a", {}, Windows(IDS[:4])), ("b", {}, DATA),
        ("c", {"form": "top", "tokens": VOCABULARY}, DATA),
    ):  # fmt: skip
        with pytest.raises(CompressError) as caught:
            stored(store(tmp_path / folder, **changed), Counting(), data)
        assert caught.value.code == "training.store"


def test_an_objective_that_needs_more_than_what_is_stored_is_refused(tmp_path: Path) -> None:
    student, teacher = two()
    targets = torch.zeros(4, dtype=torch.long)
    sampled = SampledTokens(torch.zeros(4, 1, dtype=torch.long), teacher[:, :1], 1.0)
    top = TopTokens(torch.zeros(4, 1, dtype=torch.long), teacher[:, :1], 2.0, teacher[:, 1])
    for objective, rows, code in (
        (JSD(), sampled, "training.sampled-teacher"), (KL(direction="reverse"), sampled, "training.sampled-teacher"),
        (KL(), top, "training.temperature"),
    ):  # fmt: skip
        with pytest.raises(CompressError) as caught:
            objective.per_token(student, targets, rows)
        assert caught.value.code == code
