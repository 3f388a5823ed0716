"""Trials on the same windows compared in pairs: what they share of a window's difficulty drops out of the difference.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any, NamedTuple

Trial = dict[str, Any]
Facts = dict[str, Any]


class Estimate(NamedTuple):
    """A mean over tokens and its standard error, windows being what varies."""

    mean: float
    error: float


class Method(NamedTuple):
    """All trials of one row: the same but for the calibration draw."""

    setting: str
    who: str
    name: str
    trials: tuple[Trial, ...]

    @property
    def candidate(self) -> bool:
        """Whether it may be chosen: ours, and measured on the validation texts."""
        return self.who == "ours" and all(trial["candidate"] for trial in self.trials)

    def windows(self, text: str, what: str) -> list[float]:
        """Sums of every window, means over the draws that were measured on the text."""
        drawn = [trial["texts"][text][what] for trial in self.trials if text in trial["texts"]]
        return [mean(each) for each in zip(*drawn, strict=True)]

    def perplexities(self, text: str, tokens: Sequence[int]) -> list[float]:
        """Of every draw."""
        return [math.exp(sum(trial["texts"][text]["nats"]) / sum(tokens)) for trial in self.trials]


def methods(facts: Facts) -> list[Method]:
    """In the order in which they were first measured."""
    rows: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in facts["trials"]:
        rows.setdefault((trial["setting"], trial["who"], trial["method"]), []).append(trial)
    return [Method(*key, tuple(trials)) for key, trials in rows.items()]


def difference(first: Method, second: Method, facts: Facts, texts: Iterable[str], what: str = "nats") -> Estimate:
    """Of `what` per token, first minus second, over the windows of all the texts together."""
    apart, tokens = list[float](), list[int]()
    for text in texts:
        pairs = zip(first.windows(text, what), second.windows(text, what), strict=True)
        apart += [one - other for one, other in pairs]
        tokens += facts["tokens"][text]
    return estimate(apart, tokens)


def on_common_draws(first: Method, second: Method) -> tuple[Method, Method]:
    """Both with the calibration draws that both have: what a draw does to every method drops out too."""
    mine, other = ({trial["draw"]: trial for trial in each.trials} for each in (first, second))
    both = sorted(mine.keys() & other.keys())
    taken = (tuple(trials[draw] for draw in both) for trials in (mine, other))
    one, two = (each._replace(trials=trials) for each, trials in zip((first, second), taken, strict=True))
    return one, two


def between_draws(first: Method, second: Method, facts: Facts, texts: Iterable[str]) -> list[float]:
    """The difference of their losses in every draw that both have."""
    names, apart = list(texts), list[float]()
    for one, two in zip(*(each.trials for each in on_common_draws(first, second)), strict=True):
        pair = (first._replace(trials=(one,)), second._replace(trials=(two,)))
        apart.append(difference(*pair, facts, names).mean)
    return apart


def ratio(first: Method, second: Method, facts: Facts, texts: Iterable[str]) -> Estimate:
    """Of their perplexities; the error is that of a first-order expansion of exp."""
    apart = difference(first, second, facts, texts)
    return Estimate(math.exp(apart.mean), math.exp(apart.mean) * apart.error)


def estimate(sums: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Mean per token, and the linearised error of a ratio of sums; as `evaluation/bootstrap.py` has it.

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.3.
    """
    count, total = len(sums), sum(tokens)
    centre = sum(sums) / total
    spread = sum((each - many * centre) ** 2 for each, many in zip(sums, tokens, strict=True))
    return Estimate(centre, math.sqrt(spread * count / (count - 1)) / total)


def chosen(rows: Sequence[Method], setting: str, facts: Facts) -> Method | None:
    """Our method with the lowest loss on the validation texts, which nothing else is reported of."""
    texts, tokens = facts["protocol"]["validation"], facts["tokens"]
    candidates = [row for row in rows if row.setting == setting and row.candidate]
    if not candidates or not texts:
        return None
    total = sum(sum(tokens[text]) for text in texts)
    return min(candidates, key=lambda row: sum(sum(row.windows(text, "nats")) for text in texts) / total)
