"""The verdict is a function of measurements, and its sentences claim what they say."""

from __future__ import annotations

import pytest

from llmcompress.records.evaluation import Evaluation
from llmcompress.records.gate import GateLimit, GateResult, NotFinite
from llmcompress.records.measurements import WeightBytes
from llmcompress.report.kinds import lines
from llmcompress.report.verdict import got_worse, verdict
from tests.report.example import answers, cost, divergence, estimate, evaluation, interval, perplexity, task


def of(*measurements: object) -> Evaluation:
    return evaluation(measurements=measurements)


def sizes(dense: int, compressed: int) -> tuple[WeightBytes, WeightBytes]:
    return WeightBytes(of="dense", bytes=dense), WeightBytes(of="compressed", bytes=compressed)


def test_size_speed_and_flips_stand_in_one_verdict() -> None:
    found = verdict(
        of(*sizes(360, 100), cost("dense", 30), cost("compressed", 30), task("compressed", 0.5), answers(0.014, 0.007))
    )
    assert found == (
        "3.6× smaller; decode 1.0×: not faster on this runtime. 2.1 % of answers flipped, 1.4 of them to wrong."
    )


@pytest.mark.parametrize(
    ("measurements", "said"),
    [
        (sizes(100, 99), "As large as the dense model."),
        (sizes(100, 250), "2.5× larger."),
        ((cost("dense", 30), cost("compressed", 60)), "Decode 2.0× as fast."),
        ((cost("dense", 30), cost("compressed", 15)), "Decode 0.5×: slower on this runtime."),
        ((task("compressed", 0.5), answers(0, 0)), "No answer of 500 changed between right and wrong."),
        (
            (divergence(),),
            "Perplexity on wikitext2:test 1.2 % ± 0.4 % higher; 96.0 % of the most likely next tokens are the same.",
        ),
        (
            (divergence(loss_increase=estimate(0.001, 0.002)),),
            "Perplexity on wikitext2:test no different (+0.1 % ± 0.4 %); 96.0 % of the most likely next tokens are the "
            "same.",
        ),
        ((NotFinite(metric="wikitext2:test", what="NaN"),), "Computes NaN or Inf on wikitext2:test."),
        ((), ""),
    ],
)
def test_every_sentence(measurements: tuple[object, ...], said: str) -> None:
    assert verdict(of(*measurements)) == said


def test_a_broken_gate_is_said() -> None:
    limit = GateLimit(name="kl_mean", limit=0.05, found=0.0712, on="wikitext2:test", kept=False)
    said = verdict(of(GateResult(limits=(limit,))))
    assert said == "Quality gate not kept: kl_mean on wikitext2:test is 0.0712, and at most 0.05 is allowed."


def test_a_group_of_tasks_is_not_counted_twice() -> None:
    of_group = answers(0.5, 0.5, name="both")
    found = verdict(of(task("compressed", 0.5), answers(0.014, 0.007), of_group))
    assert found == "2.1 % of answers flipped, 1.4 of them to wrong."


def test_worse_is_only_what_is_worse_beyond_its_interval() -> None:
    unsure = answers(0.014, 0.007).model_copy(update={"change": interval(-0.007, 0.01)})
    found = of(perplexity("compressed", 20.2), divergence(), task("compressed", 0.53), unsure, *sizes(360, 100))
    assert [line.title for line in got_worse(found)] == ["perplexity on wikitext2:test"]


def test_the_mean_of_tasks_adds_up_their_variances() -> None:
    found = of(
        task("compressed", 0.5),
        task("compressed", 0.5, "piqa"),
        answers(0.02, 0.0),
        answers(0.04, 0.0, "piqa"),
    )
    (mean,) = [line for line in lines(found) if line.name == "mean score"]
    assert mean.change is not None and mean.change.value == pytest.approx(-0.03)
    assert mean.change.low is not None and mean.change.high is not None
    # two errors of 0.005: sqrt(2 · 0.005²) / 2
    assert (mean.change.high - mean.change.low) / 2 == pytest.approx(1.96 * 0.005 / 2**0.5, rel=1e-3)
