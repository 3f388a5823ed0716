"""BM25: which passages fit a question, by the words they share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


class BM25:
    """Okapi BM25 over passages.

    Source: Robertson and Zaragoza, Foundations and Trends in Information Retrieval 3 (2009), equation 3.15; k₁ and b as
    in Lucene, whose logarithm is never negative either.
    """

    def __init__(self, passages: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        self._counts = [Counter(words(passage)) for passage in passages]
        lengths = [sum(counts.values()) for counts in self._counts]
        mean = sum(lengths) / max(1, len(lengths)) or 1.0
        self._damping = [k1 * (1 - b + b * length / mean) for length in lengths]
        self._k1 = k1
        documents = Counter(word for counts in self._counts for word in counts)
        self._weights = {
            word: math.log1p((len(passages) - count + 0.5) / (count + 0.5)) for word, count in documents.items()
        }

    def scores(self, query: str) -> list[float]:
        """Of every passage."""
        asked = [word for word in words(query) if word in self._weights]
        return [
            sum(
                self._weights[word] * counts[word] * (self._k1 + 1) / (counts[word] + damping)
                for word in asked
                if counts[word]
            )
            for counts, damping in zip(self._counts, self._damping, strict=True)
        ]

    def best(self, query: str, count: int) -> list[int]:
        """Numbers of the best passages, the best first; of equals the earlier."""
        scores = self.scores(query)
        return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return _WORD.findall(text.lower())
