"""Where a compressed model differs from the dense one: by position in the window, and the worst tokens with their text.

N = predictions that count, in all windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.evaluation.divergence import divergences
from llmcompress.evaluation.scores import WindowScores
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.records.quality import PositionProfile, PositionRange, WorstToken, WorstTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANGES = 32
WORST = 20
TOKENS_BEFORE, TOKENS_AFTER = 24, 8
"""Of the text beside a worst token."""


def position_profile(
    text: EvaluationText, dense: Sequence[WindowScores], compressed: Sequence[WindowScores]
) -> PositionProfile:
    """KL and losses by the number of tokens before a prediction, in ranges of equal width."""
    before_N = torch.cat([torch.arange(len(own.targets_P)) + 1 + text.skips[own.window] for own in compressed])
    first, last = int(before_N.min()), int(before_N.max())
    width = -(-(last - first + 1) // RANGES)
    range_N = (before_N - first) // width
    values_3N = torch.stack(
        [
            _divergences(dense, compressed),
            *(-torch.cat([each.logprob_P.double() for each in of]) for of in (dense, compressed)),
        ]
    )
    count = int(range_N.max()) + 1
    tokens = torch.bincount(range_N, minlength=count)
    means_3 = torch.zeros(3, count, dtype=torch.float64).index_add_(1, range_N, values_3N) / tokens.clamp(min=1)
    ranges = [
        PositionRange(
            first=first + width * number,
            last=min(first + width * (number + 1) - 1, last),
            tokens=int(tokens[number]),
            kl=float(means_3[0, number]),
            dense_loss=float(means_3[1, number]),
            compressed_loss=float(means_3[2, number]),
        )
        for number in range(count)
        if tokens[number]
    ]
    return PositionProfile(text=text.name, protocol=text.protocol, ranges=tuple(ranges))


def worst_tokens(
    text: EvaluationText,
    dense: Sequence[WindowScores],
    compressed: Sequence[WindowScores],
    tokenizer: PreTrainedTokenizerBase,
) -> WorstTokens:
    """The predictions with the largest KL, as a person can read them."""
    kl_N = _divergences(dense, compressed)
    ends = torch.tensor([len(each.targets_P) for each in compressed]).cumsum(0)
    found = []
    for number in kl_N.topk(min(WORST, len(kl_N))).indices.tolist():
        index = int((ends <= number).sum())
        place = number - (int(ends[index - 1]) if index else 0)
        found.append(_worst_token(text, (dense[index], compressed[index]), place, tokenizer, kl=float(kl_N[number])))
    return WorstTokens(text=text.name, protocol=text.protocol, tokens=tuple(found))


def _worst_token(
    text: EvaluationText,
    pair: tuple[WindowScores, WindowScores],
    place: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kl: float,
) -> WorstToken:
    dense, own = pair
    window = text.windows[own.window].tolist()
    position = place + 1 + text.skips[own.window]

    def written(tokens: list[int]) -> str:
        shown: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return shown

    def probability(logprobs_P: Tensor) -> float:
        return float(logprobs_P[place].double().exp())

    return WorstToken(
        window=own.window,
        position=position,
        kl=kl,
        before=written(window[max(0, position - TOKENS_BEFORE) : position]),
        actual=written(window[position : position + 1]),
        after=written(window[position + 1 : position + 1 + TOKENS_AFTER]),
        dense_probability=probability(dense.logprob_P),
        compressed_probability=probability(own.logprob_P),
        dense_top=written([int(dense.best_P[place])]),
        dense_top_probability=probability(dense.best_logprob_P),
        compressed_top=written([int(own.best_P[place])]),
        compressed_top_probability=probability(own.best_logprob_P),
    )


def _divergences(dense: Sequence[WindowScores], compressed: Sequence[WindowScores]) -> Tensor:
    pairs = zip(dense, compressed, strict=True)
    return torch.cat([divergences(before.logprobs_PK, after.logprobs_PK) for before, after in pairs])
