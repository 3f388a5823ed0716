"""A tokenizer without an unknown token drops what it does not know: that is a warning, as unknown tokens are."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmcompress.calibration.tokens import token_lists, unknown_warning
from tests.tiny_text import byte_tokenizer


def letters(known: str, *, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Each of these letters is a token; all else is dropped."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(known)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    if lowercase:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def warning(tokenizer: PreTrainedTokenizerFast, *texts: str) -> str | None:
    return unknown_warning(tokenizer, texts, token_lists(tokenizer, texts))


def test_the_share_of_text_that_is_lost_is_told():
    found = warning(letters("abc"), "abca", "xyzb")
    assert found is not None and "37.5% of the text" in found


def test_text_without_any_token_is_all_lost():
    assert "100.0% of the text" in str(warning(letters("abc"), "xyz"))


def test_a_tokenizer_that_knows_the_text_gives_no_warning():
    assert warning(byte_tokenizer(), "any text, Ünïcödé as well") is None
    assert warning(letters("abc"), "abc cba") is None


def test_accents_case_and_spaces_are_not_called_lost():
    assert warning(letters("abcdeu", lowercase=True), "ÄBC  çdé Ü") is None
