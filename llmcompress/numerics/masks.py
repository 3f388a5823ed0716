"""Pruning masks with exactly the requested sparsity, ties included. O = outputs, I = inputs.

A mask is True where a weight is pruned. Among equal scores the first ones are pruned, so that a mask is deterministic
and exact: a threshold with `<=` would prune every tie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
import torch
from torch import Tensor

from llmcompress.errors import CompressError, ExitCode

_NAME = re.compile(r"(?P<zeros>[1-9]\d*):(?P<of>[1-9]\d*)")

_LARGE = 1 << 18
"""Number of scores from which sampling is faster."""


@dataclass(frozen=True)
class Pattern:
    """`zeros` weights of every `of` neighbouring inputs are zero."""

    zeros: int
    of: int

    @property
    def name(self) -> str:
        """The name that `named_pattern` reads back."""
        return f"{self.zeros}:{self.of}"

    @property
    def share(self) -> float:
        """Zeros ÷ weights."""
        return self.zeros / self.of


def named_pattern(name: str) -> Pattern | None:
    """Read `unstructured` (None) or `N:M`.

    Raises: CompressError for any other name.
    """
    if name == "unstructured":
        return None
    found = _NAME.fullmatch(name)
    if not found or int(found["zeros"]) >= int(found["of"]):
        raise CompressError(
            "sparsity.pattern",
            f"{name!r} is not a sparsity pattern",
            fix="write `unstructured`, or N:M for N zeros in every M consecutive inputs, N < M, e.g. 2:4 or 4:8",
            exit_code=ExitCode.USAGE,
        )
    return Pattern(int(found["zeros"]), int(found["of"]))


def count_of_zeros(share: float, weights: int) -> int:
    """How many of so many weights make up the share, rounded half up."""
    return math.floor(share * weights + 0.5)


def lie_on_a_grid(weight_OI: Tensor) -> bool:
    """Whether zero is no more than one of the levels that these weights were once rounded to.

    Then zero is about as frequent as the levels on either side of it, each for itself. Zeros of pruning are far more
    frequent than any level, and the smallest weight beside them is hardly ever there twice. Looked at are runs of 32
    inputs, which no usual group of a quantized checkpoint splits, and no more than 256 rows.
    """
    outputs, inputs = weight_OI.shape
    runs_RN = weight_OI[:: -(-outputs // _LOOKED_AT), : inputs // _RUN * _RUN].reshape(-1, _RUN)
    zeros_R = (runs_RN == 0).sum(1)
    some_R = (zeros_R > 0) & (zeros_R < _RUN)
    if not bool(some_R.any()):
        return False
    runs_RN = runs_RN[some_R].abs()
    levels_RN = runs_RN.masked_fill(runs_RN == 0, torch.inf)
    beside = int((levels_RN == levels_RN.amin(1, keepdim=True)).sum())
    return beside > _BESIDE * int(zeros_R.sum())


_RUN, _LOOKED_AT = 32, 256
_BESIDE = 1.25
"""Weights on the two levels beside zero ÷ zeros: near 2 on a grid, near 1 for single zeros among other weights."""


def zeros_first(score: Tensor, weight: Tensor) -> Tensor:
    """The scores, which are not negative, with -1 where the weight is zero already: those count as dropped first."""
    return score.masked_fill(weight == 0, -1.0)


def lowest(score: Tensor, count: int) -> Tensor:
    """The `count` lowest scores of a tensor of any shape."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _kth_lowest(score.flatten(), count)
    mask = score <= threshold
    surplus = int(mask.sum()) - count
    if surplus:
        ties = (score == threshold).flatten().nonzero().squeeze(1)
        mask.view(-1)[ties[-surplus:]] = False
    return mask


def _kth_lowest(score: Tensor, count: int) -> Tensor:
    """The count-th lowest: a sample says between which two values it surely lies, and only those are searched."""
    if len(score) >= _LARGE:
        sample = score[:: len(score) // 4096].sort().values
        place = count * len(sample) // len(score)
        low, high = sample[max(place - 200, 0)], sample[min(place + 200, len(sample) - 1)]
        inside = score[(score >= low) & (score <= high)]
        before = int((score < low).sum())
        if before < count <= before + len(inside):
            return _selected(inside, count - before)
    return _selected(score, count)


def _selected(score: Tensor, count: int) -> Tensor:
    """The count-th lowest along the last axis, which stays. On a CPU by NumPy, in a third of the time."""
    if score.device.type != "cpu":
        return score.kthvalue(count, dim=-1, keepdim=True).values
    found = numpy.partition(score.detach().numpy(), count - 1, axis=-1)[..., count - 1 : count]
    return torch.from_numpy(found.copy())


def lowest_per_row(score_OI: Tensor, share: float) -> Tensor:
    """Prunes the lowest scores of every row; where the count is fractional, rows alternate, and the total is exact.

    Source: Sun et al., arXiv 2306.11695, section 3 (per-output comparison groups).
    """
    outputs, inputs = score_OI.shape
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    ends = [count_of_zeros(share, inputs * row) for row in range(outputs + 1)]
    counts = [end - start for start, end in pairwise(ends)]
    if len(set(counts)) == 1 and counts[0]:
        return _lowest_of_each_row(score_OI, counts[0])
    for count in set(counts) - {0}:
        rows = [row for row, each in enumerate(counts) if each == count]
        mask_OI[rows] = _lowest_of_each_row(score_OI[rows], count)
    return mask_OI


def _lowest_of_each_row(score_OI: Tensor, count: int) -> Tensor:
    threshold_O1 = _selected(score_OI, count)
    mask_OI = score_OI <= threshold_O1
    if int(mask_OI.sum()) > count * len(score_OI):
        equal_OI = score_OI == threshold_O1
        missing_O1 = count - (score_OI < threshold_O1).sum(1, keepdim=True)
        mask_OI &= ~equal_OI | (equal_OI.cumsum(1) <= missing_O1)
    return mask_OI


def lowest_per_group(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """The `zeros` lowest of every `of` neighbouring inputs of a row."""
    outputs, inputs = score_OI.shape
    assert inputs % pattern.of == 0, f"{inputs} inputs do not divide into groups of {pattern.of}"
    members = score_OI.view(outputs, -1, pattern.of).unbind(-1)
    return torch.stack(lowest_of(members, pattern.zeros), dim=-1).view(outputs, inputs)


def lowest_of(members: Sequence[Tensor], count: int) -> list[Tensor]:
    """Position by position, the `count` lowest of several tensors of one shape.

    Every pair is compared: for groups of 4 or 8 that is several times faster than sorting millions of tiny rows.
    """
    ranks = [torch.zeros_like(member, dtype=torch.int16) for member in members]
    for later in range(1, len(members)):
        for earlier in range(later):
            first = members[earlier] <= members[later]
            ranks[later] += first
            ranks[earlier] += ~first
    return [rank < count for rank in ranks]


def lowest_counts(parts: Callable[[], Iterable[Tensor]], count: int) -> list[int]:
    """How many of the `count` lowest scores of all parts together lie in each part; ties go to the first parts.

    Exact without ever holding two parts: float32 that are not negative are ordered like their bits, so two histograms
    of 16 bits each find the threshold.
    """
    if count <= 0:
        return [0 for _ in parts()]
    high, before = _bucket((_bits(part) >> 16 for part in parts()), count)
    low, _ = _bucket((_among(_bits(part), high) for part in parts()), count - before)
    threshold = (high << 16) | low
    below = [int((_bits(part) < threshold).sum()) for part in parts()]
    missing = count - sum(below)
    found = []
    for part, sure in zip(parts(), below, strict=True):
        ties = min(missing, int((_bits(part) == threshold).sum()))
        missing -= ties
        found.append(sure + ties)
    return found


def _bits(score: Tensor) -> Tensor:
    return score.detach().float().flatten().contiguous().view(torch.int32)


def _among(bits: Tensor, high: int) -> Tensor:
    """The low halves of those that share the high half."""
    return bits[(bits >> 16) == high] & 0xFFFF


def _bucket(parts: Iterable[Tensor], count: int) -> tuple[int, int]:
    """The bucket that holds the count-th lowest of all, and how many lie in the buckets before it."""
    total = torch.zeros(1 << 16, dtype=torch.int64)
    for part in parts:
        total += torch.bincount(part, minlength=1 << 16).cpu()
    ends = total.cumsum(0)
    bucket = int(torch.searchsorted(ends, count))
    return bucket, int(ends[bucket] - total[bucket])
