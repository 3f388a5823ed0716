"""Log-likelihoods of continuations against one float64 forward for each, and what is not run twice."""

from __future__ import annotations

import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.evaluation.tasks import continuations as module
from llmcompress.evaluation.tasks.continuations import Continuation, likelihoods, readings
from llmcompress.progress import Silent
from llmcompress.runners.torch_runner import TorchRunner
from tests.tiny_text import tiny_llama


def asked(*pairs: tuple[list[int], list[int]]) -> list[Continuation]:
    return [Continuation(tuple([*context, *answer][:-1]), tuple(answer)) for context, answer in pairs]


QUESTION, OTHER = [5, 6, 7, 8], [9, 10]
ASKED = asked(
    (QUESTION, [20]),
    (QUESTION, [21]),
    (QUESTION, [21, 22, 23]),
    (OTHER, [30, 31]),
    (OTHER, [30, 32]),
    ([5], [6, 7, 8, 20]),
    ([4, 4, 4, 4, 4, 4, 4, 4, 4], [3]),
)


@torch.no_grad()
def exact(model, each: Continuation) -> tuple[float, bool]:
    """By itself, in float64."""
    logprobs = torch.log_softmax(model(torch.tensor([each.inputs])).logits[0].double(), -1)[-len(each.targets) :]
    total = sum(float(row[token]) for row, token in zip(logprobs, each.targets, strict=True))
    return total, [int(row.argmax()) for row in logprobs] == list(each.targets)


@pytest.mark.parametrize("piece_bytes", [4 * 259 * 2, 2**22])
def test_every_continuation_gets_what_it_gets_alone(monkeypatch, piece_bytes):
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    model = tiny_llama()
    greedy = Continuation((5, 6), (int(model(torch.tensor([[5, 6]])).logits[0, -1].argmax()),))
    with TorchRunner(model) as runner:
        found = likelihoods(runner, [*ASKED, greedy], progress=Silent(), title="")
    for each, got in zip([*ASKED, greedy], found, strict=True):
        wanted, best = exact(model, each)
        assert abs(got.log_likelihood - wanted) < 1e-4
        assert got.is_greedy == best
    assert found[-1].is_greedy


def test_an_input_that_begins_another_is_not_run():
    found = readings([each.inputs for each in ASKED])
    assert [len(each.inputs) for each in found] == [9, 6, 3]  # the questions' common beginning is read from the longest
    assert sorted(index for each in found for index in each.readers) == list(range(len(ASKED)))
    assert all(
        each.inputs[: len(ASKED[index].inputs)] == ASKED[index].inputs for each in found for index in each.readers
    )


def test_readings_equal_a_search_over_all_pairs():
    draw = torch.Generator().manual_seed(0)
    inputs = [
        tuple(torch.randint(0, 2, (int(length),), generator=draw).tolist())
        for length in torch.randint(1, 6, (60,), generator=draw)
    ]
    run = {each.inputs for each in readings(inputs)}
    assert run == {own for own in inputs if not any(other != own and other[: len(own)] == own for other in inputs)}


def test_a_likelihood_that_is_not_finite_names_the_part_of_the_model():
    model = tiny_llama()
    model.lm_head.weight.data[5] = float("inf")
    with TorchRunner(model) as runner, pytest.raises(CompressError, match="lm_head") as caught:
        likelihoods(runner, ASKED, progress=Silent(), title="answers")
    assert caught.value.code == "numerics.not-finite"
