"""Typing errors and other wordings: always the same ones, at the stated rate, and only where they belong."""

from __future__ import annotations

import difflib

import pytest

from llmcompress.errors import CompressError
from llmcompress.evaluation.robustness.disturbances import CharacterNoise, paraphrases

TEXT = "The quick brown fox, naïve as ever, jumps 12 times over the lazy dog.\n" * 40


def test_errors_are_the_same_every_time_and_others_with_another_seed():
    noise = CharacterNoise(0.05, 0)
    assert noise(TEXT) == noise(TEXT) != TEXT
    assert CharacterNoise(0.05, 1)(TEXT) != noise(TEXT)
    assert noise.name == "noise:0.05"


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_as_many_letters_are_hit_as_stated(rate):
    lines = [f"{number}: the quick brown fox jumps over the lazy dog" for number in range(400)]
    noise, letters = CharacterNoise(rate, 0), 400 * 35
    changed = [noise(line) for line in lines]
    edits = sum(
        tag != "equal"
        for pair in zip(lines, changed, strict=True)
        for tag, *_ in difflib.SequenceMatcher(None, *pair).get_opcodes()
    )
    # an exchange is two edits; none where a letter is the last of its word
    assert 1.0 * rate * letters < edits < 1.5 * rate * letters
    # about as many letters are doubled as left out
    assert abs(sum(map(len, changed)) - sum(map(len, lines))) < 0.2 * rate * letters


def test_digits_punctuation_and_lines_stay():
    changed = CharacterNoise(0.2, 3)(TEXT)
    for kept in "12,.\n ":
        assert changed.count(kept) == TEXT.count(kept)
    assert CharacterNoise(0.2, 0)("12 + 34 = 46\n") == "12 + 34 = 46\n"


def test_paraphrases_keep_the_question_and_every_example_before_it():
    asked = "Question: What {is} this?\nAnswer: a stone\n\nQuestion: And\nthat?\nAnswer:"
    short, polite, announced = paraphrases(None)
    assert short(asked) == "Q: What {is} this?\nA: a stone\n\nQ: And\nthat?\nA:"
    assert "What {is} this?" in polite(asked) and polite(asked).endswith("The answer is")
    assert announced("Once upon a time").endswith("\n\nOnce upon a time")
    assert short("Once upon a time") == "Once upon a time"


def test_an_unknown_paraphrase_is_refused_naming_the_nearest():
    with pytest.raises(CompressError, match="polite"):
        paraphrases(["polit"])
