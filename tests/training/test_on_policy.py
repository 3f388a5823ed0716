"""On-policy text: who writes it, how often, what is replayed; a killed training goes on with the same texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.progress import Silent
from llmcompress.run import Run
from llmcompress.training.data.base import Windows
from llmcompress.training.data.batch import IGNORED, Batch, Sample, padded
from llmcompress.training.generation import Share, drawn
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.objectives.base import Objective
from llmcompress.training.objectives.contrastive import Contrastive
from llmcompress.training.objectives.kl import KL
from llmcompress.training.objectives.minillm import MiniLLM
from llmcompress.training.on_policy import (
    AdaptiveSampler,
    FractionSampler,
    OnPolicy,
    Sampler,
    Writer,
    given_samples,
    joined,
    prompts,
)
from llmcompress.training.replay import ReplayBuffer
from llmcompress.training.settings import Training
from llmcompress.training.teacher import ModelTeacher
from tests.families import VOCABULARY, tiny_model, tiny_tokens

CPU = torch.device("cpu")
IDS = tiny_tokens("llama", batch=8)


def writer(mix: float = 0.0, **settings: object) -> Writer:
    teacher = ModelTeacher(tiny_model("llama", seed=1), CPU)
    return Writer(OnPolicy.model_validate({"prompt": 3, "tokens": 4, **settings}), teacher, mix)


def test_tokens_are_drawn_from_the_mixture_of_the_distributions() -> None:
    """A chi-square test of the first token, and the same text with and without a cache for the tokens after it."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    prompt, count = IDS[0, :5], 4000
    torch.manual_seed(0)
    shares = [Share(student, 0.8), Share(teacher, 0.2)]
    texts = drawn([prompt] * count, shares, tokens=1)
    with torch.no_grad():
        q, p = (each(prompt[None]).logits[0, -1].softmax(-1) for each in (student, teacher))
    expected = count * (0.8 * q + 0.2 * p)
    found = torch.bincount(torch.tensor([int(text.ids_T[-1]) for text in texts]), minlength=VOCABULARY)
    common = expected > 5
    freedom = int(common.sum())
    square = ((found - expected).square() / expected)[common].sum()
    assert abs(float(square) - freedom) < 5 * (2 * freedom) ** 0.5


def test_what_was_read_is_kept_and_changes_nothing() -> None:
    model = tiny_model("llama_gqa")
    ids = tiny_tokens("llama_gqa", batch=2)[:, :4]

    class Forgetful(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            said = model(input_ids=input_ids, use_cache=False)
            said.past_key_values = None
            return said

    texts = []
    for each in (model, Forgetful()):
        torch.manual_seed(0)
        texts.append(drawn(list(ids), [Share(each, 1.0)], tokens=5))  # type: ignore[arg-type]
    assert all(torch.equal(a.ids_T, b.ids_T) for a, b in zip(*texts, strict=True))


def test_a_text_ends_with_a_stop_token_and_prompts_of_any_length_keep_their_place() -> None:
    torch.manual_seed(0)
    stop = frozenset(range(0, VOCABULARY, 3))
    given = [IDS[0, :5], IDS[1, :2], IDS[2, :5], IDS[3, :3]]
    texts = drawn(given, [Share(tiny_model("llama"), 1.0)], tokens=6, stop=stop)
    lengths = set()
    for prompt, text in zip(given, texts, strict=True):
        written = text.ids_T[len(prompt) :].tolist()
        assert torch.equal(text.ids_T[: len(prompt)], prompt) and text.learned_T is not None
        assert text.learned_T.tolist() == [False] * len(prompt) + [True] * len(written)
        assert not set(written[:-1]) & stop and (written[-1] in stop or len(written) == 6)
        lengths.add(len(written))
    assert len(lengths) > 1


def test_prompts_are_what_comes_before_the_answer_or_the_beginning_of_a_window() -> None:
    learned = torch.tensor([False] * 4 + [True] * 4)
    batch = padded([Sample(IDS[0, :8], learned), Sample(IDS[1, :6])])
    found = prompts(batch, 3)
    assert torch.equal(found[0], IDS[0, :4]) and torch.equal(found[1], IDS[1, :3])
    assert torch.equal(prompts(batch, 99)[1], IDS[1, :5]), "at least one token is left to write"


def test_given_samples_stay_what_they_are_beside_generated_ones() -> None:
    learned = torch.tensor([False] * 4 + [True] * 4)
    batch = padded([Sample(IDS[0, :8], learned), Sample(IDS[1, :6])])
    again = padded(given_samples(batch))
    assert torch.equal(again.targets_BT, batch.targets_BT) and torch.equal(again.ids_BT, batch.ids_BT)
    both = joined([Sample(IDS[2], torch.arange(IDS.shape[1]) >= 3)], batch, beside=True)
    assert both.generated_B is not None and both.generated_B.tolist() == [True, False, False]
    assert both.predicted == batch.predicted + IDS.shape[1] - 3
    assert int((both.targets_BT[both.generated_R.view_as(both.ids_BT)] != IGNORED).sum()) == IDS.shape[1] - 3
    alone = joined([Sample(IDS[2])], batch, beside=False)
    assert len(alone.ids_BT) == 1


def test_the_fraction_of_generated_batches_is_the_one_asked_for() -> None:
    class Quick(Writer):
        def write(self, given: Batch, student: PreTrainedModel) -> list[Sample]:
            return [Sample(IDS[0])]

    torch.manual_seed(0)
    batch, model = padded([Sample(IDS[0])]), tiny_model("llama")
    for fraction in (0.0, 0.25, 1.0):
        sampler = FractionSampler(Quick(OnPolicy(fraction=fraction), None))
        share = sum(sampler.batch(1, batch, model).generated_B is not None for _ in range(400)) / 400
        assert abs(share - fraction) <= 0.1 * (0 < fraction < 1)


def test_the_schedule_raises_phi_on_a_growing_loss_alone_and_moves_from_writing_to_replaying() -> None:
    sampler = AdaptiveSampler(writer(buffer=6), steps=100)
    batch, model = padded([Sample(row) for row in IDS[:2]]), tiny_model("llama")
    sampler.validated(2.0)
    assert sampler.phi == 0 and sampler.batch(1, batch, model) is batch
    sampler.validated(2.05)
    assert sampler.phi == 0, "within the margin"
    for loss, phi in ((2.11, 0.1), (2.15, 0.1), (2.22, 0.2)):  # the reference moves only when φ does
        sampler.validated(loss)
        assert sampler.phi == pytest.approx(phi)
    for number in range(20):
        sampler.validated(3.0 + number)
    assert sampler.phi == 1
    torch.manual_seed(0)
    fresh = sampler.batch(1, batch, model)
    replayed = sampler.batch(100, batch, model)
    assert fresh.generated_B is not None and replayed.generated_B is not None
    assert sorted(map(tuple, fresh.ids_BT.tolist())) == sorted(map(tuple, replayed.ids_BT.tolist()))


def test_the_oldest_texts_make_room_and_a_buffer_is_restored() -> None:
    buffer, other = ReplayBuffer(3), ReplayBuffer(3)
    for row, length in zip(IDS[:5], (4, 5, 6, 7, 8), strict=True):
        buffer.add([Sample(row[:length], torch.arange(length) >= 2)])
    other.restore(buffer.state())
    for each in (buffer, other):
        torch.manual_seed(0)
        found = sorted(each.some(3), key=lambda text: len(text.ids_T))
        assert [len(text.ids_T) for text in found] == [6, 7, 8]
        for row, text in zip(IDS[2:5], found, strict=True):
            assert torch.equal(text.ids_T, row[: len(text.ids_T)]) and text.learned_T is not None
            assert int(text.learned_T.sum()) == len(text.ids_T) - 2


class Killed(Exception):
    pass


class Watching(Silent):
    def __init__(self, die: int) -> None:
        self._die = die

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        if done == self._die:
            raise Killed


@pytest.mark.parametrize("kind", ["gkd", "adaptive", "minillm", "contrastive"])
def test_a_training_on_its_own_text_learns_and_killed_and_resumed_equals_uninterrupted(
    kind: str, tmp_path: Path
) -> None:
    rate = 3e-3 if kind == "minillm" else 1e-2  # a policy gradient of four texts is noisy
    settings = Training(steps=6, batch=2, learning_rate=rate, save_every=2, validation=0.25)

    def once(folder: Path, die: int = -1) -> dict[str, torch.Tensor]:
        student = tiny_model("llama")
        teacher = ModelTeacher(tiny_model("llama", seed=1), CPU)
        objective: Objective
        sampler: Sampler
        if kind == "adaptive":
            objective, adaptive = KL(), AdaptiveSampler(writer(validate_every=1, buffer=4), steps=6)
            adaptive._phi, sampler = 0.9, adaptive
        else:
            objective = {"gkd": KL(direction="reverse"), "minillm": MiniLLM(), "contrastive": Contrastive()}[kind]
            fraction = 0.5 if kind == "gkd" else 1.0
            sampler = FractionSampler(writer(objective.mixes(), fraction=fraction), beside=objective.takes_both())
        with Run.open(folder / "out", fingerprint={}, lock_text="", fresh=False) as run:
            context = RunContext(IDS, keep=run, progress=Watching(die))
            report = train(
                student, Windows(IDS), settings, context, objective=objective, teacher=teacher,
                job=Job("train", sampler=sampler),
            )  # fmt: skip
        assert report.validation_before is not None and report.validation_after is not None
        assert report.validation_after < report.validation_before
        return student.state_dict()

    through = once(tmp_path / "through")
    with pytest.raises(Killed):
        once(tmp_path / "killed", die=5)
    again = once(tmp_path / "killed")
    assert all(torch.equal(each, through[name]) for name, each in again.items())


def test_an_adaptive_share_needs_validation_samples() -> None:
    job = Job("train", sampler=AdaptiveSampler(writer(), steps=1))
    teacher = ModelTeacher(tiny_model("llama", seed=1), CPU)
    with pytest.raises(CompressError) as caught:
        train(
            tiny_model("llama"), Windows(IDS), Training(steps=1, batch=2), RunContext(IDS), objective=KL(),
            teacher=teacher, job=job,
        )  # fmt: skip
    assert caught.value.code == "training.validation"


def test_text_of_the_teacher_needs_a_model_in_memory() -> None:
    with pytest.raises(CompressError) as caught:
        Writer(OnPolicy(by="teacher"), None).write(padded([Sample(IDS[0])]), tiny_model("llama"))
    assert caught.value.code == "training.live-teacher"
