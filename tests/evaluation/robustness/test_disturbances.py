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
    letters = sum(map(str.isalpha, TEXT))
    changed = CharacterNoise(rate, 0)(TEXT)
    # a third of the errors leave a letter out, a third double one: what is lost and gained in length is about equal
    assert abs(len(changed) - len(TEXT)) < rate * letters / 3
    edits = sum(
        tag != "equal" for tag, *_ in difflib.SequenceMatcher(None, TEXT, changed, autojunk=False).get_opcodes()
    )
    assert 0.6 * rate * letters < edits < 2.2 * rate * letters  # an exchange is up to two edits


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
