"""llama-perplexity's KL base file: our rows against its loop written out plainly, and there and back."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.evaluation.kl_base import kl_base_path, kl_base_scores, save_kl_base
from llmcompress.evaluation.metrics.base import Subject
from llmcompress.evaluation.metrics.perplexity import PerplexityMetric
from llmcompress.evaluation.scores import score
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import evaluation_text
from llmcompress.progress import Silent
from llmcompress.records.measurements import Divergence, PerplexityResult
from llmcompress.runners.kl_base import KlBase, decoded_rows, encoded_rows
from llmcompress.runners.torch_runner import TorchRunner
from tests.tiny_text import byte_tokenizer, tiny_llama

TEXT = "The quick brown fox, naïve as ever, jumps over the lazy dog. " * 3


def row_of_llama_cpp(logits: list[float]) -> tuple[float, float, list[int]]:
    """`log_softmax` of perplexity.cpp: scale, lowest log-probability, codes."""
    largest = max(logits)
    lowest = max(min(logits), largest - 16)
    total = math.log(sum(math.exp(each - largest) for each in logits))
    scale = (largest - lowest) / 65535
    codes = [round((each - lowest) / scale) if each > lowest else 0 for each in logits]
    return scale, lowest - largest - total, codes


def kl_of_llama_cpp(row: tuple[float, float, list[int]], logits: list[float]) -> float:
    """`log_softmax` with a base of perplexity.cpp."""
    scale, lowest, codes = row
    total = math.log(sum(math.exp(each) for each in logits))
    base = [scale * code + lowest for code in codes]
    return sum(math.exp(p) * (p - q + total) for p, q in zip(base, logits, strict=True) if p > -16)


@pytest.mark.parametrize("vocabulary", [259, 260])
def test_rows_are_those_that_llama_perplexity_writes(vocabulary: int) -> None:
    logits_RV = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)) * 4
    words = encoded_rows(logits_RV)
    assert words.shape[1] == 2 * ((vocabulary + 1) // 2) + 4
    for row, logits in zip(words, logits_RV.double().tolist(), strict=True):
        scale, lowest, codes = row_of_llama_cpp(logits)
        data = row.numpy().tobytes()
        assert struct.unpack("<ff", data[:8]) == pytest.approx((scale, lowest), rel=1e-5)
        found = struct.unpack(f"<{vocabulary}H", data[8 : 8 + 2 * vocabulary])
        assert max(abs(ours - theirs) for ours, theirs in zip(found, codes, strict=True)) <= 1
    exact = torch.log_softmax(logits_RV, -1)
    near = logits_RV > logits_RV.amax(-1, keepdim=True) - 16
    decoded = decoded_rows(words, vocabulary)
    assert float((decoded - exact)[near].abs().max()) < 2e-4
    torch.testing.assert_close(decoded.double().exp().sum(-1), torch.ones(4).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("habit", [True, False])
def test_a_file_stands_in_for_the_dense_model(tmp_path, habit: bool) -> None:
    dense, other, tokenizer = tiny_llama(), tiny_llama(), byte_tokenizer(bos_habit=habit)
    for model in (dense, other):
        model.lm_head.weight.data *= 0.3  # no token is more than 16 nats below the best one, where a file ends
    other.lm_head.weight.data += 0.05 * torch.randn(259, 16, generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    task = PerplexityTask(protocol="llama-cpp", source=str(tmp_path / "text.txt"), window=32)
    text, file = evaluation_text(task, tokenizer, 64), tmp_path / "dense.kld"
    with TorchRunner(dense) as runner:
        save_kl_base(file, runner, text, Silent())
        live = list(score(runner, text.windows, skipped=text.skipped, top=64))
    for ours, theirs in zip(kl_base_scores(file, text, top=64), live, strict=True):
        torch.testing.assert_close(ours.logprob_P, theirs.logprob_P, rtol=0, atol=3e-4)
        torch.testing.assert_close(ours.logprobs_PK, theirs.logprobs_PK, rtol=0, atol=3e-4)
        assert torch.equal(ours.targets_P, theirs.targets_P)

    (metric,) = PerplexityMetric.prepare([PerplexityTask(source=str(file))], Subject(tokenizer, 64, 259))
    with TorchRunner(other) as runner:
        found = metric.observe(runner, Silent(), dense=None)
    before, after, divergence, *_ = metric.results(found, "model")
    assert isinstance(before, PerplexityResult) and isinstance(after, PerplexityResult)
    assert (before.of, after.of, before.protocol) == ("dense", "compressed", "llama-cpp with window 32")
    assert before.perplexity == pytest.approx(
        math.exp(-float(torch.cat([each.logprob_P for each in live]).double().mean())), rel=1e-4
    )
    # what llama-perplexity would print for the other model
    with torch.no_grad():
        rows = [
            kl_of_llama_cpp(row_of_llama_cpp(p.tolist()), q.tolist())
            for window in text.windows
            for p, q in zip(
                dense(window[None]).logits[0, 16:31].double(),
                other(window[None]).logits[0, 16:31].double(),
                strict=True,
            )
        ]
    (metric,) = PerplexityMetric.prepare([PerplexityTask(source=str(file), top=259)], Subject(tokenizer, 64, 259))
    with TorchRunner(other) as runner:
        found = metric.observe(runner, Silent(), dense=None)
    whole = metric.results(found, "model")[2]
    assert isinstance(whole, Divergence) and isinstance(divergence, Divergence)
    assert whole.kl.mean == pytest.approx(sum(rows) / len(rows), rel=0.01)
    assert divergence.kl.mean <= whole.kl.mean + 1e-6


def test_what_is_no_complete_file_is_refused(tmp_path) -> None:
    file = tmp_path / "dense.kld"
    for content, what in (
        (b"_logits_", "does not begin"),
        (b"_logits_" + struct.pack("<iii", 8, 9, 2), "of 252 bytes"),
    ):
        file.write_bytes(content)
        assert kl_base_path(str(file)) == file
        with pytest.raises(CompressError, match=what):
            KlBase(file)
    file.write_bytes(b"once upon a time")
    assert kl_base_path(str(file)) is None and kl_base_path("builtin:evaluation") is None


def test_only_chunks_with_their_second_half_scored_can_be_written(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text = evaluation_text(PerplexityTask(source=str(tmp_path / "text.txt"), window=32), byte_tokenizer(), 64)
    with TorchRunner(tiny_llama()) as runner, pytest.raises(CompressError, match="second half"):
        save_kl_base(tmp_path / "dense.kld", runner, text, Silent())
    assert not (tmp_path / "dense.kld").exists()
