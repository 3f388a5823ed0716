"""How many tokens healing takes: the law L = E + A / N^a, fitted to losses after different numbers of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import CompressError, ExitCode

_FEWEST = 4
"""Three numbers are fitted: with three points any law would fit exactly."""
_EXPONENTS = np.linspace(0.02, 3.0, 299)


@dataclass(frozen=True)
class ScalingLaw:
    """loss = floor + amount / tokens^exponent."""

    floor: float
    """What no number of tokens removes."""
    amount: float
    exponent: float
    error: float
    """Root mean square of the relative errors at the points of the fit."""

    def loss(self, tokens: float) -> float:
        """Expected after so many tokens."""
        return self.floor + self.amount * math.pow(tokens, -self.exponent)

    def tokens(self, loss: float) -> float:
        """How many it takes to come down to that loss; infinite at the floor and below."""
        above = loss - self.floor
        return math.inf if above <= 0 else (self.amount / above) ** (1 / self.exponent)


def fit_scaling_law(tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The law that is nearest to these losses, by the sum of squared relative errors.

    For every exponent of a fine grid the other two numbers follow from non-negative least squares, so that no start has
    to be guessed, and no local minimum is found instead.

    Source: Kaplan et al., arXiv 2001.08361, with the constant term of Hoffmann et al., arXiv 2203.15556, equation 2.

    Raises: CompressError for fewer than four numbers of tokens, or losses that are not positive.
    """
    from scipy.optimize import nnls

    tokens_P, losses_P = np.asarray(tokens, dtype=float), np.asarray(losses, dtype=float)
    if len(set(tokens)) < _FEWEST or not (np.isfinite(losses_P) & (losses_P > 0) & (tokens_P > 0)).all():
        raise CompressError(
            "search.scaling-law",
            f"a scaling law needs positive losses after at least {_FEWEST} different numbers of tokens",
            where=", ".join(f"{n:g}: {loss:g}" for n, loss in zip(tokens, losses, strict=True)),
            fix="train for more different numbers of steps, none of them 0",
            exit_code=ExitCode.USAGE,
        )
    scale = float(np.exp(np.log(tokens_P).mean()))
    best: tuple[float, float, float, float] | None = None
    for exponent in _EXPONENTS:
        columns_P2 = np.stack([np.ones_like(tokens_P), (tokens_P / scale) ** -exponent], 1) / losses_P[:, None]
        (floor, amount), rest = nnls(columns_P2, np.ones_like(losses_P))
        if best is None or rest < best[0]:
            best = (float(rest), float(floor), float(amount), float(exponent))
    assert best is not None
    rest, floor, amount, exponent = best
    return ScalingLaw(floor, amount * scale**exponent, exponent, rest / math.sqrt(len(losses_P)))
