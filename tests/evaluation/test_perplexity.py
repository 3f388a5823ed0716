from __future__ import annotations

import math

import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.evaluation import scores as module
from llmcompress.evaluation.perplexity import measure, perplexity
from llmcompress.evaluation.settings.perplexity import DEFAULT_TOKENS, PerplexityTask
from llmcompress.evaluation.texts import evaluation_text, evaluation_texts
from llmcompress.runners.torch_runner import TorchRunner
from tests.tiny_text import byte_tokenizer, tiny_llama, word_tokenizer

POSITIONS = 64
"""Of the tiny Llama."""

TEXT = "The quick brown fox, naïve as ever, jumps over the lazy dog. " * 2


def naive(model, tokens: list[int], window: int, bos: int | None) -> tuple[float, int]:
    """Loss and count, one token after the other, in float64, each from its own forward."""
    model = model.double()
    step = window if bos is None else window - 1
    loss, count = 0.0, 0
    for start in range(0, len(tokens), step):
        seen = [] if bos is None else [bos]
        for token in tokens[start : start + step]:
            if seen:
                logits = model(input_ids=torch.tensor([seen])).logits[0, -1].detach()
                loss -= math.log(float(torch.softmax(logits, -1)[token]))
                count += 1
            seen.append(token)
    model.float()
    return loss, count


def task(tmp_path, text: str = TEXT, **options) -> PerplexityTask:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return PerplexityTask(source=str(tmp_path / "text.txt"), **options)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("window", [2, 3, 13, 32])
def test_equals_one_forward_per_token_in_float64(tmp_path, window, bos):
    model, tokenizer = tiny_llama(), byte_tokenizer(bos_habit=bos)
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    loss, count = naive(model, tokens, window, 0 if bos else None)
    result = perplexity(model, tokenizer, task(tmp_path, window=window))
    assert (result.bos, result.window, result.tokens) == (bos, window, count)
    assert math.isclose(result.perplexity, math.exp(loss / count), rel_tol=1e-5)


def test_bits_per_byte_counts_the_bytes_of_predicted_tokens_only(tmp_path):
    tokenizer = word_tokenizer(["good", "words", "and", "ones"])
    result = perplexity(tiny_llama(), tokenizer, task(tmp_path, "good words and good ones", window=3))
    # windows: good [words and] and good [ones]; in brackets what is predicted, with the space before it
    predicted_bytes = len(" words and") + len(" ones")
    assert result.tokens == 3
    assert math.isclose(result.bits_per_byte, 3 * math.log2(result.perplexity) / predicted_bytes, rel_tol=1e-12)


def test_with_a_bos_every_byte_is_predicted(tmp_path):
    result = perplexity(tiny_llama(), byte_tokenizer(bos_habit=True), task(tmp_path, window=16))
    assert result.tokens == len(TEXT.encode())
    assert math.isclose(result.bits_per_byte, math.log2(result.perplexity), rel_tol=1e-12)


def test_a_tokenizer_without_positions_gives_every_token_its_share_of_the_bytes(tmp_path):
    class Slow:
        is_fast, bos_token_id, unk_token_id = False, None, None

        def __call__(self, text, **_):
            return {"input_ids": [1] * 5} if isinstance(text, str) else {"input_ids": [[1] * 5]}

        def decode(self, tokens, **_):
            return "x" * 20

    prepared = evaluation_text(task(tmp_path, "x" * 20, window=5), Slow(), POSITIONS)
    assert prepared.predicted_bytes == 16


def test_bytes_of_characters_of_several_tokens_are_counted_once(tmp_path):
    text = "é€😀 naïve ✓ done"
    prepared = evaluation_text(task(tmp_path, text, window=64, bos="always"), byte_tokenizer(), POSITIONS)
    assert prepared.predicted_bytes == len(text.encode())
    never = evaluation_text(task(tmp_path, "a" + text, window=64, bos="never"), byte_tokenizer(), POSITIONS)
    assert never.predicted_bytes == len(text.encode())


def test_batch_size_and_piece_size_change_nothing(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), byte_tokenizer(bos_habit=True)
    results = [perplexity(model, tokenizer, task(tmp_path, window=16), batch=batch) for batch in (None, 1, 3, 100)]
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * 259 * 5)
    results.append(perplexity(model, tokenizer, task(tmp_path, window=16)))
    for result in results:
        assert math.isclose(result.perplexity, results[0].perplexity, rel_tol=1e-6)
        assert result.tokens == results[0].tokens


def test_windows_hold_the_whole_text_once_and_in_order(tmp_path):
    tokenizer = byte_tokenizer()
    for bos in ("always", "never"):
        prepared = evaluation_text(task(tmp_path, window=16, bos=bos), tokenizer, POSITIONS)
        skip = 1 if bos == "always" else 0
        assert tokenizer.decode([token for window in prepared.windows for token in window[skip:].tolist()]) == TEXT
        assert {len(window) for window in prepared.windows[:-1]} == {16}


def test_max_windows_measures_the_first_windows_and_their_bytes(tmp_path):
    prepared = evaluation_text(
        task(tmp_path, "x" * 100, window=16, bos="never", max_windows=3), byte_tokenizer(), POSITIONS
    )
    assert (len(prepared.windows), prepared.tokens, prepared.predicted_bytes) == (3, 45, 45)


def test_so_much_of_a_text_is_measured_unless_told_and_the_rest_is_counted(tmp_path):
    long = "x" * 40_000
    for most, windows in ((None, DEFAULT_TOKENS // 64), ("all", 625), (3, 3)):
        prepared = evaluation_text(
            task(tmp_path, long, window=64, bos="never", max_windows=most), byte_tokenizer(), POSITIONS
        )
        assert (len(prepared.windows), prepared.text_tokens) == (windows, 40_000)


def test_a_last_window_of_one_token_without_bos_predicts_nothing(tmp_path):
    prepared = evaluation_text(task(tmp_path, "x" * 17, window=16, bos="never"), byte_tokenizer(), POSITIONS)
    assert (len(prepared.windows), prepared.tokens, prepared.predicted_bytes) == (1, 15, 15)


def test_the_bos_rule_follows_the_tokenizer_unless_told(tmp_path):
    for habit in (True, False):
        tokenizer = byte_tokenizer(bos_habit=habit)
        rules = {
            bos: evaluation_text(task(tmp_path, bos=bos), tokenizer, POSITIONS).bos
            for bos in ("auto", "always", "never")
        }
        assert rules == {"auto": habit, "always": True, "never": False}
    with pytest.raises(CompressError, match="no BOS"):
        evaluation_text(task(tmp_path, bos="always"), byte_tokenizer(bos=False), POSITIONS)


def test_windows_longer_than_the_model_are_cut_with_a_warning(tmp_path):
    prepared = evaluation_text(task(tmp_path, window=1000), byte_tokenizer(), 64)
    assert prepared.window == 64
    assert any("1000 to 64" in warning for warning in prepared.warnings)
    assert evaluation_text(task(tmp_path), byte_tokenizer(), 64).window == 64


def test_the_bundled_text_is_measured_without_a_network():
    result = perplexity(
        tiny_llama(), byte_tokenizer(), PerplexityTask(source="builtin:evaluation", window=64, max_windows=4)
    )
    assert result.text == "builtin:evaluation"
    assert result.tokens == 4 * 63


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(CompressError, match="no usable samples"):
        evaluation_text(task(tmp_path, " \n"), byte_tokenizer(), POSITIONS)
    with pytest.raises(CompressError, match="no token to predict"):
        evaluation_text(task(tmp_path, "x", bos="never"), byte_tokenizer(), POSITIONS)


def test_a_loss_that_is_not_finite_is_refused_naming_the_windows(tmp_path):
    model = tiny_llama()
    prepared = evaluation_text(task(tmp_path, window=16), byte_tokenizer(), POSITIONS)
    model.lm_head.weight.data[5] = float("inf")
    with pytest.raises(CompressError, match=r"window 1 of .*text\.txt") as caught:
        measure(TorchRunner(model), prepared)
    assert caught.value.code == "numerics.not-finite" and "lm_head" in caught.value.what


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    model = tiny_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perplexity(model, byte_tokenizer(), task(tmp_path))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_different_texts_of_one_file_name_are_told_apart_and_no_folder_is_named(tmp_path):
    tasks = []
    for folder, text in (("wiki", TEXT), ("books", TEXT[::-1]), ("again", TEXT)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text(text)
        tasks.append(PerplexityTask(source=str(tmp_path / folder / "test.txt"), window=16))
    wiki, books, again = (text.name for text in evaluation_texts(tasks, byte_tokenizer(), None))
    assert wiki == again != books and all(name.startswith("test.txt:") for name in (wiki, books))
    assert [text.name for text in evaluation_texts(tasks[:1], byte_tokenizer(), None)] == ["test.txt"]
