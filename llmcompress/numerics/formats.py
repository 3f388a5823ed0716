"""Number formats other than integers: the values of their codes, and the kinds of scales.

A code is an int8: the bit pattern of an 8-bit float, or an index into a table of sixteen values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class NumberFormat(Protocol):
    """A finite set of values around an exact zero. Rounding is to nearest, ties to the even code, saturating."""

    @property
    def name(self) -> str:
        """As schemes spell it."""

    @property
    def bits(self) -> int:
        """Width of a code."""

    @property
    def low(self) -> int:
        """Smallest code."""

    @property
    def reach(self) -> float:
        """The value that the largest weight of a group is scaled to."""

    @property
    def exponent(self) -> int:
        """Exponent of the largest power of two among the values: what MX scales subtract."""

    def encode(self, values: Tensor) -> Tensor:
        """Codes of the nearest values."""

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values that codes stand for."""

    def nearest(self, values: Tensor) -> Tensor:
        """`decode(encode(values))`, in the dtype of `values`."""


@dataclass(frozen=True)
class CastFormat:
    """A float that torch has: a code is its bit pattern.

    Source: OCP 8-bit floating point specification (OFP8), revision 1.0.
    """

    name: str
    dtype: torch.dtype
    reach: float
    bits: int = 8
    low: int = -128

    @property
    def exponent(self) -> int:
        """Of the largest value."""
        return math.frexp(torch.finfo(self.dtype).max)[1] - 1

    def encode(self, values: Tensor) -> Tensor:
        """Bit patterns."""
        return self._cast(values).view(torch.int8)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of bit patterns."""
        return codes.view(self.dtype).to(dtype)

    def nearest(self, values: Tensor) -> Tensor:
        """There and back."""
        return self._cast(values).to(values.dtype)

    def _cast(self, values: Tensor) -> Tensor:
        # torch's own cast answers NaN beyond the range
        most = torch.finfo(self.dtype).max
        return values.clamp(-most, most).to(self.dtype)


@dataclass(frozen=True)
class TableFormat:
    """Up to 16 values; a code is a place in the table, of two equal values the first."""

    name: str
    values: tuple[float, ...]
    bits: int = 4
    low: int = 0

    @property
    def reach(self) -> float:
        """The largest value."""
        return max(self.values)

    @property
    def exponent(self) -> int:
        """Of the largest value."""
        return math.frexp(self.reach)[1] - 1

    def encode(self, values: Tensor) -> Tensor:
        """Places in the table."""
        sought = _search(self, values.dtype, values.device)
        return sought.code_V.index_select(0, sought.rank(values)).view(values.shape)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Table look-up."""
        return _table(self, dtype, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest value of the table."""
        sought = _search(self, values.dtype, values.device)
        return sought.value_V.index_select(0, sought.rank(values)).view(values.shape)


@dataclass(frozen=True)
class _Search:
    """Which value of a table is nearest, in one look-up and one comparison: six times as fast as bisection.

    The range is cut into equal cells so narrow that none holds two of the bounds between neighbouring values.
    C = cells, V = values in rising order.
    """

    start: float
    cells_per_unit: float
    bound_C: Tensor
    rank_C: Tensor
    """Of the value below the bound."""
    code_V: Tensor
    value_V: Tensor

    def rank(self, values: Tensor) -> Tensor:
        """Place of the nearest value among those in rising order."""
        flat = values.flatten()
        most = len(self.bound_C) - 1
        cell = ((flat - self.start) * self.cells_per_unit).clamp_(0, most).int().clamp_(0, most)  # twice: NaN is no int
        return self.rank_C.index_select(0, cell).add_(flat > self.bound_C.index_select(0, cell))


@cache
def _table(number: TableFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(number.values, dtype=dtype, device=device)


@cache
def _search(number: TableFormat, dtype: torch.dtype, device: torch.device) -> _Search:
    codes = {value + 0.0: code for code, value in reversed(list(enumerate(number.values)))}  # -0 becomes 0
    ascending = sorted(codes)
    middles = [(low + high) / 2 for low, high in pairwise(ascending)]
    # a value on a bound belongs to the lower neighbour, unless the upper one is the even code
    bounds = torch.tensor(middles, dtype=dtype)
    up = torch.tensor([codes[high] % 2 == 0 for high in ascending[1:]])
    bounds = torch.where(up, torch.nextafter(bounds, torch.full_like(bounds, -torch.inf)), bounds)
    # of many cuts the one whose edges lie farthest from any bound: near them a difference may be rounded across
    width = min(high - low for low, high in pairwise(middles)) / 2
    starts = [ascending[0] - width * part / 64 for part in range(64)]
    start = max(starts, key=lambda start: min(_to_edge((middle - start) / width) for middle in middles))
    cells = [int((middle - start) / width) for middle in middles]
    assert len(set(cells)) == len(cells), "two bounds in one cell"
    bound_C, rank_C = (
        torch.full((cells[-1] + 2,), torch.inf, dtype=dtype),
        torch.zeros(cells[-1] + 2, dtype=torch.int32),
    )
    for rank, (cell, bound) in enumerate(zip(cells, bounds.tolist(), strict=True)):
        bound_C[cell] = bound
        rank_C[cell] = rank
        rank_C[cell + 1 :] = rank + 1
    order = torch.tensor([codes[value] for value in ascending], dtype=torch.int8)
    return _Search(
        start,
        1 / width,
        bound_C.to(device),
        rank_C.to(device),
        order.to(device),
        torch.tensor(ascending, dtype=dtype, device=device),
    )


def _to_edge(place: float) -> float:
    return min(place % 1, -place % 1)


E4M3 = CastFormat("fp8", torch.float8_e4m3fn, reach=448.0)

E5M2 = CastFormat("fp8e5m2", torch.float8_e5m2, reach=448.0)
"""Scaled to the reach of E4M3 and not to its own 57344: scales so small have no precision in float16, and what is left
below is still wider than E4M3's range."""

E2M1 = TableFormat("fp4", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
"""Source: OCP Microscaling formats (MX) specification, version 1.0, section 5.3.3."""

NF4 = TableFormat(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
"""Quantiles of a normal distribution around an exact zero. Source: Dettmers et al., arXiv 2305.14314, appendix E."""


@dataclass(frozen=True)
class ScaleKind:
    """What the scale of a group may be. `bits` None: a float of the checkpoint's dtype."""

    name: str
    bits: int | None = None
    shared_bits: int = 0
    """Bits of a second scale, one per matrix or one per super-block."""
    single: bool = False
    """One scale per matrix and no other."""
    super_block: int | None = None
    """Inputs of a row that share a second scale, a float16; the scale of each of their groups is an integer times it.
    """
    integers: tuple[int, int] = (0, 0)
    """The smallest and the largest of these integers."""
    minima: bool = False
    """Weight = (code - lowest code) · scale - minimum. The minima of groups are integers times a third float16 of the
    super-block, from 0 to the largest integer."""

    def width(self, checkpoint_bits: int) -> int:
        """Stored bits of one group's scale, and of its minimum."""
        one = checkpoint_bits if self.bits is None else self.bits
        return 2 * one if self.minima else one

    @property
    def depends_on_all_rows(self) -> bool:
        """Whether a scale is one of the whole matrix."""
        return self.single or (self.shared_bits > 0 and self.super_block is None)


STORED = ScaleKind("stored")

SINGLE = ScaleKind("single", single=True)

POWER_OF_TWO = ScaleKind("power of two", bits=8)
"""E8M0: a sign-less exponent."""

TWO_LEVEL = ScaleKind("two levels", bits=8, shared_bits=32)
"""E4M3 per group, divided by one float32 per matrix that brings the largest of them near 448."""


def super_blocks(bits: int, integers: tuple[int, int], *, minima: bool) -> ScaleKind:
    """The scales of K-quants: of so many bits, in super-blocks of 256 inputs.

    Source: `block_q2_K` to `block_q6_K` in ggml-common.h of ggml.
    """
    return ScaleKind(f"super-blocks of {bits}-bit scales", bits, 16, False, 256, integers, minima)


def power_of_two(largest_OG: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """The scale 2^(floor(log2 largest) - exponent), kept inside what E8M0 and `dtype` can say.

    Source: OCP MX specification, version 1.0, section 6.3.
    """
    info = torch.finfo(dtype)
    least = max(-126, math.frexp(info.smallest_normal * info.eps)[1] - 1)
    most = math.frexp(info.max)[1] - 1
    power_OG = torch.frexp(largest_OG).exponent - 1 - exponent
    return torch.ldexp(torch.ones_like(largest_OG), power_OG.clamp_(least, most))


def scales_to_bytes(stored_OG: Tensor, kind: ScaleKind) -> Tensor:
    """Scales as they lie in a file, as uint8 where their kind has eight bits."""
    if kind == POWER_OF_TWO:
        return (torch.frexp(stored_OG.float()).exponent + 126).to(torch.uint8)
    if kind == TWO_LEVEL:
        return E4M3.encode(stored_OG.float()).view(torch.uint8)
    return stored_OG


def scales_from_bytes(found_OG: Tensor, kind: ScaleKind, dtype: torch.dtype) -> Tensor:
    """What `scales_to_bytes` was given, in `dtype` where they were bytes."""
    if kind == POWER_OF_TWO:
        return torch.ldexp(torch.ones_like(found_OG, dtype=torch.float32), found_OG.int() - 127).to(dtype)
    if kind == TWO_LEVEL:
        return E4M3.decode(found_OG.view(torch.int8), dtype)
    return found_OG


def shared_scale(largest: Tensor, number: NumberFormat) -> Tensor:
    """What two-level scales are divided by: a float32, one element. A matrix of zeros gets 1.

    Source: NVFP4 as compressed-tensors stores it; the inverse is largest ÷ (448 · 6).
    Differs: the next lower power of two. Loaders divide by it in bfloat16 (transformers 4) or float32 (5), which only
    then is the same, and the bit lost at the lower end of E4M3's range is none that any group here uses.
    """
    shared = E4M3.reach * number.reach / largest.float().reshape(1)
    exponent = torch.frexp(shared).exponent - 1
    return torch.where(shared.isfinite(), torch.ldexp(torch.ones_like(shared), exponent), torch.ones_like(shared))
