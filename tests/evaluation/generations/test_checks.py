"""Verifiable instructions, each followed by one text and not by another."""

from __future__ import annotations

import pytest

from llmcompress.evaluation.generations.checks import Check, checks_of

FOLLOWED = [
    (
        "keywords:existence",
        {"keywords": ["fresh", "morning"]},
        "Fresh bread every morning.",
        "Freshly baked this morning.",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["wood"]}, "A wooden table.", "A table of wood."),
    ("keywords:frequency", {"keyword": "no", "frequency": 2, "relation": "at least"}, "No, no!", "No!"),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "Two words.",
        "These are three words",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "One two three", "One two"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "It rains. Go in!",
        "It rains.",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one\n* two\n* three"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<rain>>\nIt rains.", "<rain>\nIt rains."),
    ("change_case:english_lowercase", {}, "the sea, 3 miles off.", "The sea."),
    ("change_case:english_capital", {}, "THE SEA.", "The sea."),
    ("punctuation:no_comma", {}, "A dog.", "A dog, brown."),
    ("startend:end_checker", {"end_phrase": "Sleep well."}, "Good night. sleep well. ", "Sleep well. Bye."),
    ("startend:quotation", {}, ' "So it is." ', "So it is."),
]


@pytest.mark.parametrize(("kind", "arguments", "right", "wrong"), FOLLOWED)
def test_a_text_that_follows_is_told_from_one_that_does_not(kind, arguments, right, wrong):
    check = Check(kind, arguments)
    assert check.follows(right) and not check.follows(wrong)
    assert not check.follows("  \n")


def test_kinds_that_cannot_be_verified_here_are_not_counted():
    found = checks_of(["punctuation:no_comma", "language:response_language"], [{}, {"language": "de"}])
    assert [each.kind for each in found] == ["punctuation:no_comma"]
    assert checks_of(["punctuation:no_comma"], [])[0].arguments == {}
