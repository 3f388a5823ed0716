"""Which parts of a pruned model were which parts of the model that it was made from, found by comparing them.

S = parts of the student, P = parts of the teacher, O, I = rows and columns of a weight, B = samples, T = tokens,
G = key and value heads, D = width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.skeleton import find_blocks

_ROWS = 4
"""Rows of a weight that are looked for: kept ones are copies."""
_UNLIKE = 0.5
"""1 - cosine beyond which nothing was kept."""


def kept_blocks(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[int, int]:
    """The teacher's block that each block of the student was made from, by the likeness of their weights.

    Blocks keep their order. Rows that `width` kept are copies, so the student's blocks may be narrower, too.

    Raises: CompressError where a block resembles none of the teacher's, or several equally.
    """
    mine, theirs = ([block for _, block in find_blocks(model)] for model in (student, teacher))
    cost_SP = torch.tensor([[_distance(one, other) for other in theirs] for one in mine], dtype=torch.float64)
    chosen = increasing(cost_SP, what="layers")
    for index, place in enumerate(chosen):
        others = cost_SP[index].clone()
        others[place] = torch.inf
        if cost_SP[index, place] > _UNLIKE or float(others.min()) <= cost_SP[index, place]:
            raise _unknown(f"block {index} of the student does not tell which block of the teacher it was", "layers")
    return dict(enumerate(chosen))


def kept_heads(mine_BGTD: Tensor, theirs_BGTD: Tensor) -> list[int]:
    """The teacher's key-value head that each of the student's was, by the likeness of their values on one text.

    Raises: CompressError where heads have different widths, or the student more of them.
    """
    if mine_BGTD.shape[-1] != theirs_BGTD.shape[-1]:
        raise _unknown(f"heads have {mine_BGTD.shape[-1]} and {theirs_BGTD.shape[-1]} channels", "heads")
    mine, theirs = (values.transpose(0, 1).flatten(1).double() for values in (mine_BGTD, theirs_BGTD))
    mine, theirs = (functional.normalize(values, dim=-1) for values in (mine, theirs))
    return increasing((1 - mine @ theirs.T).cpu(), what="heads")


def increasing(cost_SP: Tensor, *, what: str) -> list[int]:
    """For each row a column, in increasing order, with the smallest sum of costs.

    Raises: CompressError where there are more rows than columns.
    """
    rows, columns = cost_SP.shape
    if rows > columns:
        raise _unknown(f"the student has {rows} {what} and the teacher {columns}", what)
    best_P, come_from = torch.zeros(columns + 1, dtype=torch.float64), []
    for cost_P in cost_SP.double():
        # best_P[p]: the rows so far within the first p columns
        here_P = torch.full_like(best_P, torch.inf)
        here_P[1:] = best_P[:-1] + cost_P
        least_P, at_P = here_P.cummin(0)
        come_from.append(at_P)
        best_P = least_P
    found, place = list[int](), columns
    for at_P in reversed(come_from):
        place = int(at_P[place]) - 1
        found.append(place)
    return found[::-1]


@torch.no_grad()
def _distance(one: nn.Module, other: nn.Module) -> float:
    """1 - cosine between some rows of the student's matrices and the most similar rows of the teacher's, on average.

    Infinite where no two matrices have equally many columns.
    """
    theirs = other.state_dict()
    found = []
    for name, mine_OI in one.state_dict().items():
        there_OI = theirs.get(name)
        if there_OI is None or mine_OI.dim() != 2 or mine_OI.shape[1:] != there_OI.shape[1:]:
            continue
        sample_RI = mine_OI[:: max(1, len(mine_OI) // _ROWS)][:_ROWS]
        sample_RI, there_OI = (
            functional.normalize(each.to(mine_OI.device).float(), dim=-1) for each in (sample_RI, there_OI)
        )
        found.append(1 - float((sample_RI @ there_OI.T).amax(1).mean()))
    return sum(found) / len(found) if found else float("inf")


def _unknown(what: str, where: str) -> CompressError:
    return CompressError(
        "training.origin",
        f"{where} cannot be mapped as they were kept: {what}",
        where=where,
        fix=f"use a teacher that the student was pruned from, or write `{where}` out",
        exit_code=ExitCode.USAGE,
    )
