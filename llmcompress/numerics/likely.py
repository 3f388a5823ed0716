"""The most likely tokens of rows of logits or log-probabilities. R = rows, V = vocabulary, G = groups, C = columns of
a group, K = tokens kept.

Columns are taken in groups of eight, as far apart as possible: the largest of every group is found at the speed of
memory, and what is among the K largest stands in one of the K groups with the largest maxima.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8


def best_tokens(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of every row, and its column; of equal ones always the same."""
    values_R1, columns_R1 = top_tokens(logits_RV, 1)
    return values_R1[:, 0], columns_R1[:, 0]


def top_tokens(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of every row, falling, and their columns. A NaN counts as the largest."""
    rows, vocabulary = logits_RV.shape
    groups = vocabulary // GROUP
    if count >= groups:
        return logits_RV.topk(min(count, vocabulary), -1)
    logits_RCG = logits_RV[:, : groups * GROUP].reshape(rows, GROUP, groups)
    # a plain maximum is found several times faster than one with its place
    chosen_RK = logits_RCG.amax(1).topk(count, -1).indices
    members_RCK = torch.arange(GROUP, device=logits_RV.device)[:, None] * groups + chosen_RK[:, None]
    rest = torch.arange(groups * GROUP, vocabulary, device=logits_RV.device).expand(rows, -1)
    candidates_RN = torch.cat([members_RCK.flatten(1), rest], -1)
    values_RK, places_RK = logits_RV.gather(-1, candidates_RN).topk(count, -1)
    return values_RK, candidates_RN.gather(-1, places_RK)
