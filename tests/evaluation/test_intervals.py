"""Intervals by resampling windows: how often they hold the truth; what is counted per token, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.evaluation.bootstrap import MOST_UNITS, Bootstrap, estimate
from llmcompress.evaluation.confidence import BINS, calibration_error, calibration_sums
from llmcompress.evaluation.corpora import corpus_warnings
from llmcompress.evaluation.divergence import AgainstDense, divergences
from llmcompress.evaluation.moved_tokens import BINS as BINS_OF_POSITIONS
from llmcompress.evaluation.moved_tokens import SHOWN, moved_tokens
from llmcompress.evaluation.reductions import feed
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.records.measurements import Divergence, Estimate
from llmcompress.runners.torch_runner import TorchRunner
from tests.tiny_text import byte_tokenizer, tiny_llama

WINDOWS = tuple(torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(number)) for number in range(6))
SKIPPED = (20,) * 6
TEXT = EvaluationText("text", "", WINDOWS, 40, False, 200, frozenset(), skipped=SKIPPED)


def windows(count: int, random: torch.Generator) -> list[torch.Tensor]:
    """Skewed values whose windows share a disturbance; their mean is 2 and their median is known by simulation."""
    shared = torch.randn(count, generator=random)
    return [(0.5 * torch.randn(20, generator=random) + each).exp() for each in shared]


def test_an_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    random = torch.Generator().manual_seed(0)
    truth = torch.cat(windows(20_000, random))
    mean, median = float(truth.mean()), float(truth.median())
    trials = [windows(60, random) for _ in range(200)]
    held_mean = held_median = 0
    samples = Bootstrap(60)
    for trial in trials:
        found, (_, interval) = samples.mean(trial), samples.quantile(trial, 0.5)
        assert found.low is not None and found.high is not None and interval is not None
        held_mean += found.low <= mean <= found.high
        held_median += interval[0] <= median <= interval[1]
    # a normal interval of so skewed a mean would hold it in about 90 %
    assert 0.89 <= held_mean / 200 <= 0.99 and 0.90 <= held_median / 200 <= 0.99


def test_intervals_are_the_same_every_time_and_absent_for_one_window() -> None:
    sample = windows(12, torch.Generator().manual_seed(1))
    assert estimate(sample) == estimate(sample)
    alone = estimate(sample[:1])
    assert (alone.standard_error, alone.low, alone.high) == (None, None, None)
    assert Bootstrap(1).quantile(sample[:1], 0.9)[1] is None


def test_many_windows_are_drawn_in_groups_of_neighbours() -> None:
    sample = [torch.randn(3, generator=torch.Generator().manual_seed(number)) for number in range(MOST_UNITS + 500)]
    found = estimate(sample)
    assert found.low is not None and found.high is not None and found.standard_error is not None
    assert (found.high - found.low) / found.standard_error == pytest.approx(2 * 1.96, rel=0.1)


def test_a_constant_has_an_interval_of_no_width() -> None:
    found = estimate([torch.ones(4), torch.ones(2), torch.ones(3)])
    assert (found.mean, found.low, found.high) == (1, 1, 1)


def pair(noise: float = 0.1) -> tuple[list[WindowScores], list[WindowScores]]:
    dense, other = tiny_llama(), tiny_llama()
    other.lm_head.weight.data += noise * torch.randn(259, 16, generator=torch.Generator().manual_seed(1))
    with TorchRunner(dense) as runner:
        before = list(score(runner, WINDOWS, skipped=SKIPPED, top=16))
    with TorchRunner(other) as runner:
        return before, list(score(runner, WINDOWS, skipped=SKIPPED, reference=before))


def test_the_calibration_error_is_that_of_bins_filled_one_token_after_the_other() -> None:
    scores, _ = pair()
    tokens = sorted(
        (math.exp(float(logprob)), float(best == target))
        for each in scores
        for logprob, best, target in zip(each.best_logprob_P, each.best_P, each.targets_P, strict=True)
    )
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for place, token in enumerate(tokens):
        bins[place * BINS // len(tokens)].append(token)
    wanted = sum(abs(sum(confidence - right for confidence, right in its)) for its in bins) / len(tokens)
    assert float(calibration_error(calibration_sums(scores).sum(0))) == pytest.approx(wanted, rel=1e-6)


def test_changes_of_the_actual_tokens_probability_equal_a_loop_over_tokens() -> None:
    before, after = pair()
    compared = AgainstDense(TEXT, before)
    feed(after, compared)
    found = compared.result()
    changes = [
        math.exp(float(q)) - math.exp(float(p))
        for one, other in zip(before, after, strict=True)
        for p, q in zip(one.logprob_P, other.logprob_P, strict=True)
    ]
    assert found.delta_p is not None and found.delta_p_rms is not None and found.calibration_error_change is not None
    assert found.delta_p.mean == pytest.approx(sum(changes) / len(changes), abs=1e-9)
    assert found.delta_p_rms.mean == pytest.approx(math.sqrt(sum(each**2 for each in changes) / len(changes)))
    kl = sorted(
        float(each)
        for one, other in zip(before, after, strict=True)
        for each in divergences(one.logprobs_PK, other.logprobs_PK)
    )
    assert found.kl_999 == kl[-1] and found.kl_median == kl[math.ceil(len(kl) / 2) - 1]
    assert all(low <= getattr(found, name) <= high for name, (low, high) in found.kl_intervals.items())
    assert set(found.kl_intervals) == {"kl_median", "kl_90", "kl_99", "kl_999"}
    ratio = found.perplexity_ratio
    assert ratio.low is not None and ratio.high is not None and ratio.low < ratio.mean < ratio.high


def test_positions_and_the_tokens_that_moved_most_are_counted_in_the_window() -> None:
    before, after = pair()
    tokenizer = byte_tokenizer()
    found = moved_tokens(TEXT, before, after, tokenizer.decode)
    kl = [divergences(one.logprobs_PK, other.logprobs_PK) for one, other in zip(before, after, strict=True)]
    assert (found.positions[0].first, found.positions[-1].last) == (20, 38) and len(
        found.positions
    ) <= BINS_OF_POSITIONS
    assert found.positions[0].kl == pytest.approx(float(torch.stack(kl)[:, 0].mean()))
    every = torch.cat(kl).sort(descending=True).values
    assert [each.kl for each in found.worst] == pytest.approx(every[:SHOWN].tolist())
    for each in found.worst:
        window, place = next(
            (window, place)
            for window, its in enumerate(kl)
            for place in range(len(its))
            if float(its[place]) == each.kl
        )
        tokens, position = WINDOWS[window], place + 21
        assert each.actual == tokenizer.decode([int(tokens[position])])
        assert each.before == tokenizer.decode(tokens[max(0, position - 24) : position].tolist())
        assert each.after == tokenizer.decode(tokens[position + 1 : position + 9].tolist())
        assert each.compressed == tokenizer.decode([int(after[window].best_P[place])])
        assert each.dense_best_probability is not None and each.dense_best_probability >= each.dense_probability


def divergence(text: str, mean: float, half: float | None) -> Divergence:
    ends = {} if half is None else {"low": mean - half, "high": mean + half}
    loss, none = Estimate(mean=mean, standard_error=None, **ends), Estimate(mean=0, standard_error=None)
    return Divergence(
        text=text, window=8, bos=True, tokens=70, top=4, top_mass=1, kl=none, kl_median=0, kl_90=0, kl_99=0,
        loss_increase=loss, same_top=none, right_to_wrong=none, wrong_to_right=none,
    )  # fmt: skip


def test_a_first_text_that_looks_much_better_than_another_is_told() -> None:
    first = divergence("wiki", 0.10, 0.02)
    assert corpus_warnings([first]) == corpus_warnings([]) == ()
    (told,) = corpus_warnings([first, divergence("books", 0.20, 0.03), divergence("near", 0.11, 0.03)])
    assert "books" in told and "judge by books" in told and "0.2000 (0.1700 to 0.2300)" in told
    assert not corpus_warnings([first, divergence("books", 0.14, 0.01)]), "apart, but not by much"
    assert not corpus_warnings([first, divergence("books", 0.30, None)]), "one window has no interval"
    assert not corpus_warnings([divergence("books", 0.20, 0.03), first]), "the first one is worse"
