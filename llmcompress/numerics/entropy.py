"""Lossless size of codes: Shannon's bound, and Huffman's code, which is within one bit of it.

Source: Huffman, Proc. IRE 1952; for compressed models Han et al. (Deep Compression), arXiv 1510.00149. Only reported:
nothing is stored this way, since no runtime computes with variable-length codes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import count
from math import log2

Bits = tuple[int, ...]


def entropy(counts: Mapping[int, int]) -> float:
    """Bits per symbol that no code can go below, for symbols drawn with these frequencies."""
    total = sum(counts.values())
    return sum(number / total * log2(total / number) for number in counts.values() if number)


def huffman_code(counts: Mapping[int, int]) -> dict[int, Bits]:
    """A word of bits for every symbol that occurs; none begins another. A lone symbol still takes one bit."""
    order = count()
    waiting: list[tuple[int, int, list[int]]] = [
        (number, next(order), [symbol]) for symbol, number in sorted(counts.items()) if number
    ]
    words: dict[int, Bits] = {symbol: () for _, _, (symbol,) in waiting}
    if len(words) == 1:
        return dict.fromkeys(words, (0,))
    heapq.heapify(waiting)
    while len(waiting) > 1:
        joined = [heapq.heappop(waiting), heapq.heappop(waiting)]
        for bit, (_, _, symbols) in enumerate(joined):
            for symbol in symbols:
                words[symbol] = (bit, *words[symbol])
        heapq.heappush(waiting, (joined[0][0] + joined[1][0], next(order), joined[0][2] + joined[1][2]))
    return words


def mean_bits(code: Mapping[int, Bits], counts: Mapping[int, int]) -> float:
    """Bits per symbol that the code takes for these frequencies."""
    return sum(len(code[symbol]) * number for symbol, number in counts.items() if number) / sum(counts.values())


def encode(symbols: Sequence[int], code: Mapping[int, Bits]) -> list[int]:
    """The stream of bits."""
    return [bit for symbol in symbols for bit in code[symbol]]


def decode(stream: Sequence[int], code: Mapping[int, Bits]) -> list[int]:
    """The symbols that were encoded."""
    meant = {word: symbol for symbol, word in code.items()}
    symbols: list[int] = []
    word: Bits = ()
    for bit in stream:
        word = (*word, bit)
        if word in meant:
            symbols.append(meant[word])
            word = ()
    assert not word, "the stream ends in the middle of a word"
    return symbols
