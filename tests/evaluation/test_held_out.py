"""What a user is told when a model lost far more than compression costs."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.calibration.offloading import InMemory
from llmcompress.evaluation.held_out import HeldOut, loss_increase, loss_warnings
from llmcompress.records.measurements import HeldOutLoss
from tests.families import tiny_model
from tests.passes.test_laws import windows


def measured(ratio: float) -> list[HeldOutLoss]:
    return [HeldOutLoss(windows=1, tokens=511, dense=3.0, compressed=3.0 + math.log(ratio))]


@pytest.mark.parametrize(("ratio", "told"), [(2.9, None), (3.1, "perplexity is 3.1 times"), (56.0, "model is broken")])
def test_from_three_times_the_perplexity_on_numbers_and_from_twenty_on_a_verdict(ratio: float, told: str | None):
    warnings = loss_warnings(measured(ratio))
    assert (warnings == []) if told is None else (told in warnings[0] and "511 held-out tokens" in warnings[0])


def test_the_losses_are_those_of_both_models_on_the_same_tokens():
    dense, other = tiny_model("llama_gqa", seed=1), tiny_model("llama_gqa", seed=2)
    ids_NT = windows(seed=3, count=2)
    held_out = HeldOut(ids_NT, InMemory(), torch.device("cpu"))
    (found,) = loss_increase(held_out.scores(dense), held_out.scores(other))
    for model, loss in ((dense, found.dense), (other, found.compressed)):
        with torch.no_grad():
            assert loss == pytest.approx(float(model(ids_NT, labels=ids_NT).loss), rel=1e-5)
    assert (found.windows, found.tokens) == (2, ids_NT[:, 1:].numel())
    assert loss_increase([], []) == [] == HeldOut(None, InMemory(), torch.device("cpu")).scores(dense)
