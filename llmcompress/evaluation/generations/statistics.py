"""What can be said of generated texts without another model: repetition, variety, likeness to the dense model's."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.errors import CompressError

REPEATED_WORDS = 4
"""Words of a group that counts as repeated."""


def repetition(text: str, *, words: int = REPEATED_WORDS) -> float:
    """Fraction of the groups of so many words that stood in the text before: near 1 when a model is in a loop.

    Source: Welleck et al., arXiv 1908.04319, section 6 (seq-rep-n).
    """
    groups = _groups(text, words)
    return 1 - len(set(groups)) / len(groups) if groups else 0.0


def distinct(texts: Sequence[str], words: int) -> float:
    """Different groups of so many words ÷ groups, over all texts.

    Source: Li et al., arXiv 1510.03055, section 5 (distinct-1, distinct-2).
    """
    groups = [group for text in texts for group in _groups(text, words)]
    return len(set(groups)) / len(groups) if groups else 0.0


def require_rouge() -> None:
    """Raises: CompressError when rouge-score is not installed."""
    try:
        import rouge_score  # noqa: F401
    except ImportError as problem:
        raise CompressError(
            "generations.not-installed",
            f"texts are compared by rouge-score, which cannot be imported ({problem})",
            where="evaluate.generations",
            fix='pip install "llmcompress[eval]"',
        ) from None


def rouge_l(reference: Sequence[str], texts: Sequence[str]) -> list[float]:
    """F-measure of the longest common subsequence of words, pair by pair; 1 for two empty texts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [
        1.0 if one == other else float(scorer.score(one, other)["rougeL"].fmeasure)
        for one, other in zip(reference, texts, strict=True)
    ]


def _groups(text: str, words: int) -> list[tuple[str, ...]]:
    split = text.split()
    return [tuple(split[start : start + words]) for start in range(len(split) - words + 1)]
