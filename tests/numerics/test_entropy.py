"""Coding loses nothing and stays within one bit of the bound."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.numerics.entropy import decode, encode, entropy, huffman_code, mean_bits

SYMBOLS = st.lists(st.integers(-8, 7), min_size=1, max_size=300)


@given(SYMBOLS)
def test_decoding_gives_back_what_was_encoded(symbols: list[int]) -> None:
    code = huffman_code(Counter(symbols))
    assert decode(encode(symbols, code), code) == symbols


@given(SYMBOLS)
def test_entropy_bounds_the_coded_length_within_one_bit(symbols: list[int]) -> None:
    counts = Counter(symbols)
    bits = mean_bits(huffman_code(counts), counts)
    assert entropy(counts) - 1e-12 <= bits < entropy(counts) + 1 + 1e-12
    assert bits == len(encode(symbols, huffman_code(counts))) / len(symbols)


@given(SYMBOLS)
def test_no_word_begins_another(symbols: list[int]) -> None:
    words = sorted(huffman_code(Counter(symbols)).values())
    assert all(later[: len(word)] != word for word, later in pairwise(words))


def test_by_hand() -> None:
    counts = {0: 4, 1: 2, 2: 1, 3: 1, 9: 0}
    assert entropy(counts) == mean_bits(huffman_code(counts), counts) == 1.75
    assert sorted(map(len, huffman_code(counts).values())) == [1, 2, 3, 3]
    assert huffman_code({5: 7}) == {5: (0,)} and entropy({5: 7}) == 0
    with pytest.raises(AssertionError):
        decode([1, 1], huffman_code(counts) | {0: (1, 1, 1)})
