"""Scores and what is made of them, against float64 over the whole vocabulary, one token after the other."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.evaluation import scores as module
from llmcompress.evaluation.bootstrap import estimate
from llmcompress.evaluation.divergence import AgainstDense, divergences
from llmcompress.evaluation.reductions import Perplexity, feed
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.runners.torch_runner import TorchRunner
from tests.tiny_text import tiny_llama

WINDOWS = tuple(
    torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length))
    for length in (12, 12, 12, 5, 7, 7)
)
TEXT = EvaluationText("text", "", WINDOWS, 12, False, 200, frozenset())


def scored(model, **options) -> list[WindowScores]:
    with TorchRunner(model) as runner:
        return list(score(runner, WINDOWS, **options))


@torch.no_grad()
def exact(model) -> list[torch.Tensor]:
    """Log-probabilities P×V in float64, each window by itself."""
    return [torch.log_softmax(model(window[None]).logits[0, :-1].double(), -1) for window in WINDOWS]


def test_every_window_gets_its_own_scores_in_order() -> None:
    model = tiny_llama()
    for index, (found, logprobs_PV) in enumerate(zip(scored(model, top=4), exact(model), strict=True)):
        targets_P = WINDOWS[index][1:]
        assert found.window == index and torch.equal(found.targets_P.long(), targets_P)
        wanted_P = logprobs_PV.gather(-1, targets_P[:, None])[:, 0]
        torch.testing.assert_close(found.logprob_P.double(), wanted_P, rtol=0, atol=5e-5)
        assert torch.equal(found.best_P.long(), logprobs_PV.argmax(-1))
        torch.testing.assert_close(found.best_logprob_P.double(), logprobs_PV.amax(-1), rtol=0, atol=5e-5)
        assert torch.equal(found.ids_PK.long(), logprobs_PV.topk(4).indices)
        torch.testing.assert_close(found.logprobs_PK.double(), logprobs_PV.topk(4).values, rtol=0, atol=5e-5)


def test_batches_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = scored(tiny_llama(), top=3)
    found = [scored(tiny_llama(), top=3, batch=batch) for batch in (1, 2, 100)]
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * 259 * 5)
    found.append(scored(tiny_llama(), top=3))
    for each in found:
        for ours, theirs in zip(each, wanted, strict=True):
            torch.testing.assert_close(ours.logprob_P, theirs.logprob_P, rtol=0, atol=1e-5)
            assert torch.equal(ours.ids_PK, theirs.ids_PK)


def test_no_float32_copy_of_a_whole_batch_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * 259 * 5)
    with TorchRunner(tiny_llama()) as runner:
        pieces = list(module.log_probabilities(runner, WINDOWS, (0,) * len(WINDOWS)))
    assert max(len(piece.targets_R) for piece in pieces) == 5
    assert sum(len(piece.targets_R) for piece in pieces) == TEXT.tokens


def test_skipped_predictions_are_context_alone() -> None:
    skipped = (3, 0, 10, 4, 5, 6)
    whole = scored(tiny_llama(), top=3)
    for index, found in enumerate(scored(tiny_llama(), top=3, skipped=skipped)):
        for name in ("targets_P", "logprob_P", "best_P", "best_logprob_P", "ids_PK", "logprobs_PK"):
            wanted = getattr(whole[index], name)[skipped[index] :]
            torch.testing.assert_close(getattr(found, name), wanted, rtol=0, atol=1e-5)
            assert len(getattr(found, name)) == len(WINDOWS[index]) - 1 - skipped[index]


@pytest.mark.parametrize("top", [1, 4, 259, 1000])
def test_divergence_equals_the_sum_over_the_vocabulary_where_all_of_it_is_looked_at_and_is_never_more(top: int) -> None:
    dense, other = tiny_llama(), tiny_llama()
    other.lm_head.weight.data += 0.05 * torch.randn(259, 16, generator=torch.Generator().manual_seed(1))
    before = scored(dense, top=top)
    after = scored(other, reference=before)
    compared = AgainstDense(TEXT, before)
    feed(after, compared)
    covered = torch.cat([p_PV.exp().topk(min(top, 259)).values.sum(-1) for p_PV in exact(dense)]).mean()
    assert compared.result().top_mass == pytest.approx(float(covered), abs=1e-5)
    for ours, theirs, p_PV, q_PV in zip(before, after, exact(dense), exact(other), strict=True):
        found_P = divergences(ours.logprobs_PK, theirs.logprobs_PK)
        whole_P = (p_PV.exp() * (p_PV - q_PV)).sum(-1)
        assert (found_P <= whole_P + 1e-5).all()
        if top >= 259:
            torch.testing.assert_close(found_P, whole_P, rtol=1e-3, atol=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    before = scored(tiny_llama(), top=8)
    compared = AgainstDense(TEXT, before)
    feed(scored(tiny_llama(), reference=before), compared)
    found = compared.result()
    assert (found.kl.mean, found.kl_99, found.loss_increase.mean, found.same_top.mean) == (0, 0, 0, 1)
    assert (found.right_to_wrong.mean, found.wrong_to_right.mean) == (0, 0)


def test_flips_are_counted_token_by_token_and_the_ratio_is_that_of_the_perplexities() -> None:
    dense, other = tiny_llama(), tiny_llama(seed=1)
    other.load_state_dict(dense.state_dict())
    other.lm_head.weight.data += 0.2 * torch.randn(259, 16, generator=torch.Generator().manual_seed(1))
    # what comes is what the one or the other holds most likely, so that both are right at times
    windows, rows = [], []
    for index, window in enumerate(WINDOWS):
        ids = window[:2].tolist()
        for place in range(8):
            with torch.no_grad():
                best = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for model in (dense, other)]
            choice = [*best, 5][(place + index) % 3]
            rows.append((best[0] == choice, best[1] == choice, best[0] == best[1]))
            ids.append(choice)
        windows.append(torch.tensor(ids))
    text = EvaluationText("text", "", tuple(windows), 10, False, 100, frozenset())
    with TorchRunner(dense) as runner:
        before = list(score(runner, windows, top=8))
    compared, *perplexities = AgainstDense(text, before), Perplexity(text), Perplexity(text)
    feed(before, perplexities[0])
    with TorchRunner(other) as runner:
        feed(score(runner, windows, reference=before), perplexities[1], compared)
    found = compared.result()
    # the first predicted token of each window was not chosen by a model
    with torch.no_grad():
        for window in windows:
            best = [int(model(window[None, :1]).logits[0, -1].argmax()) for model in (dense, other)]
            rows.append((best[0] == window[1], best[1] == window[1], best[0] == best[1]))
    assert found.right_to_wrong.mean == pytest.approx(sum(a and not b for a, b, _ in rows) / len(rows))
    assert found.wrong_to_right.mean == pytest.approx(sum(b and not a for a, b, _ in rows) / len(rows))
    assert found.same_top.mean == pytest.approx(sum(same for *_, same in rows) / len(rows))
    assert found.right_to_wrong.mean > 0 and found.wrong_to_right.mean > 0
    ratio = perplexities[1].result().perplexity / perplexities[0].result().perplexity
    assert found.perplexity_ratio.mean == pytest.approx(ratio, rel=1e-10)


def test_the_standard_error_is_how_much_the_mean_varies_over_samples_of_windows() -> None:
    """Windows of unequal length whose tokens share a disturbance: the error foretold ≈ the error seen."""
    generator = torch.Generator().manual_seed(0)

    def sample() -> list[torch.Tensor]:
        counts = torch.randint(5, 40, (60,), generator=generator).tolist()
        shared = torch.randn(60, generator=generator)
        return [torch.randn(n, generator=generator) * 0.5 + shared[i] for i, n in enumerate(counts)]

    found = [estimate(sample()) for _ in range(400)]
    seen = torch.tensor([each.mean for each in found]).std()
    foretold = sum(each.standard_error or math.nan for each in found) / len(found)
    assert foretold == pytest.approx(float(seen), rel=0.1)
    assert estimate([torch.ones(3)]).standard_error is None
