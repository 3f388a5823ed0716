"""Named quantization schemes: what `scheme: int4_g128` in a recipe means."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from llmcompress.errors import CompressError, ExitCode, near_names
from llmcompress.numerics.formats import (
    E2M1,
    E4M3,
    E5M2,
    NF4,
    POWER_OF_TWO,
    SINGLE,
    STORED,
    TWO_LEVEL,
    NumberFormat,
    super_blocks,
)
from llmcompress.numerics.grid import Grid

Activations = Literal["token", "tensor", "group"]
"""Inputs rounded too, to int8 or to the weights' own float format: one scale per token, found while running; one per
tensor, fixed by calibration; or one per group of inputs, found while running."""

DESCRIPTION = (
    "int{2…8}_{gN|channel}[_asym|_positive], ternary_{gN|channel}, fp8_{gN|channel|tensor}, fp8e5m2_…, "
    "fp4_{gN|channel}, nf4_{gN|channel}, mxfp4, mxfp8, nvfp4 or a K-quant of GGUF, q{2…6}_k; with rounded activations "
    "int, ternary and fp8 …_a8token or …_a8tensor, mx and nv …_a"
)
"""The syntax of `scheme`, for option descriptions and errors."""

_NUMBERS: dict[str, NumberFormat] = {each.name: each for each in (E4M3, E5M2, E2M1, NF4)}

TERNARY = "ternary"
"""-1, 0 and 1."""

_PER_TENSOR = frozenset({"fp8", "fp8e5m2"})
"""Number formats for which one scale per matrix is supported."""

_FIXED: dict[str, Grid] = {
    "mxfp4": Grid.of(E2M1, 32, POWER_OF_TWO),
    "mxfp8": Grid.of(E4M3, 32, POWER_OF_TWO),
    "nvfp4": Grid.of(E2M1, 16, TWO_LEVEL),
    "q2_k": Grid(2, False, 16, scales=super_blocks(4, (1, 15), minima=True)),
    "q3_k": Grid(3, True, 16, scales=super_blocks(6, (-32, 31), minima=False)),
    "q4_k": Grid(4, False, 32, scales=super_blocks(6, (1, 63), minima=True)),
    "q5_k": Grid(5, False, 32, scales=super_blocks(6, (1, 63), minima=True)),
    "q6_k": Grid(6, True, 16, scales=super_blocks(8, (-128, 127), minima=False)),
}
"""Formats whose groups and scales are part of their definition; `q2_k` to `q6_k` are ggml's K-quants."""

_WITHOUT_SUPER_BLOCKS = {
    "q2_k": "int4_g32",
    "q3_k": "int4_g32",
    "q4_k": "int5_g32",
    "q5_k": "int5_g32_asym",
    "q6_k": "int8_g32",
}
"""Of rows that are no whole super-blocks: Q4_0, Q5_0, Q5_1 and Q8_0. Source: `tensor_type_fallback` in llama-quant.cpp
of llama.cpp. Differs: Q4_0 for IQ4_NL, which has the same size."""

_NAME = re.compile(
    r"(?P<number>int[2-8]|ternary|fp8|fp8e5m2|fp4|nf4)_(?:g(?P<group>[1-9]\d*)|(?P<size>channel|tensor))"
    r"(?:(?P<asym>_asym)|(?P<positive>_positive))?(?:_a8(?P<a8>token|tensor))?"
)


@dataclass(frozen=True)
class Scheme:
    """A weight grid, and how activations are rounded (None: not at all)."""

    weights: Grid
    activations: Activations | None = None

    @property
    def name(self) -> str:
        """The name that `named_scheme` reads back."""
        for name, grid in _FIXED.items():
            if grid == self.weights:
                return name + ("_a" if self.activations else "")
        grid = self.weights
        size = "tensor" if grid.scales.single else "channel" if grid.group is None else f"g{grid.group}"
        number = grid.number.name if grid.number else TERNARY if grid.ternary else f"int{grid.bits}"
        sign = "_positive" if grid.positive_scales else "" if grid.symmetric else "_asym"
        return f"{number}_{size}{sign}" + (f"_a8{self.activations}" if self.activations else "")

    @property
    def measures_inputs(self) -> bool:
        """Whether activation scales are calibrated."""
        return self.activations == "tensor" or (self.activations == "group" and self.weights.scales == TWO_LEVEL)

    def without_super_blocks(self) -> Scheme | None:
        """What llama.cpp takes for rows that are no whole super-blocks; None of other schemes."""
        instead = _WITHOUT_SUPER_BLOCKS.get(self.name)
        return None if instead is None else named_scheme(instead)

    def with_group(self, group: int | None) -> Scheme:
        """The same numbers with another group size; a format with its own group size becomes its plain variant."""
        other = replace(self.weights, group=group, scales=SINGLE if self.weights.scales.single else STORED)
        return Scheme(other, None if self.activations == "group" else self.activations)

    def with_integers(self, bits: int, *, symmetric: bool) -> Scheme:
        """Integers of another width, with or without zero points; floats do not change."""
        grid = self.weights
        if grid.number is not None or (grid.bits, grid.symmetric) == (bits, symmetric):
            return self
        return replace(self, weights=Grid(bits, symmetric, grid.group))

    def with_positive_scales(self) -> Scheme:
        """The same numbers without negative scales, which most schemes do not have anyway."""
        if self.weights.scales.super_block is not None or not self.weights.mirrors:
            return self
        return replace(self, weights=replace(self.weights, positive_scales=True))

    def bits_per_weight(self, outputs: int, inputs: int, scale_bits: int) -> float:
        """Stored bits ÷ weights: codes, scales and (asymmetric) packed zero points."""
        scales = self.weights.scale_bits(outputs, inputs, scale_bits) / (outputs * inputs)
        return float(self.weights.own_bits) + scales


@cache
def named_scheme(name: str) -> Scheme:
    """The scheme of that name: see `DESCRIPTION`.

    Raises: CompressError for any other name.
    """
    for fixed, grid in _FIXED.items():
        if name == fixed or (name == f"{fixed}_a" and grid.number is not None):
            return Scheme(grid, "group" if name.endswith("_a") else None)
    found = _NAME.fullmatch(name)
    if found is None or not _makes_sense(found):
        raise _unknown(name)
    group = int(found["group"]) if found["group"] else None
    activations: Activations | None = found["a8"]  # type: ignore[assignment]
    if found["number"] == TERNARY:
        return Scheme(Grid(2, group=group, ternary=True), activations)
    if found["number"] not in _NUMBERS:
        positive = found["positive"] is not None
        grid = Grid(int(found["number"][3:]), symmetric=not found["asym"], group=group, positive_scales=positive)
        return Scheme(grid, activations)
    scales = SINGLE if found["size"] == "tensor" else STORED
    return Scheme(Grid.of(_NUMBERS[found["number"]], group, scales), activations)


def _makes_sense(found: re.Match[str]) -> bool:
    """Whether a name with the right syntax exists."""
    number = found["number"]
    if found["size"] == "tensor" and number not in _PER_TENSOR:
        return False
    if number == TERNARY:
        return not found["asym"] and not found["positive"]
    if found["positive"]:  # all other numbers have no negative scales that could be left out
        return number not in (*_NUMBERS, "int8")
    return number not in _NUMBERS or (not found["asym"] and (not found["a8"] or _NUMBERS[number].bits == 8))


def _unknown(name: str) -> CompressError:
    numbers = [f"int{bits}" for bits in range(2, 9)] + [TERNARY, *_NUMBERS]
    sizes = ("channel", "tensor", "g128", "g64", "g32")
    endings = ("", "_asym", "_positive", "_a8token", "_a8tensor")
    tried = (_NAME.fullmatch(f"{each}_{size}{end}") for each in numbers for size in sizes for end in endings)
    known = [found[0] for found in tried if found and _makes_sense(found)]
    known += [*_FIXED, *(f"{each}_a" for each, grid in _FIXED.items() if grid.number is not None)]
    nearest = near_names(name, known)
    hint = f"did you mean `{nearest[0]}`? Schemes are " if nearest else "write "
    return CompressError(
        "scheme.unknown",
        f"{name!r} is not a quantization scheme",
        fix=f"{hint}{DESCRIPTION}, e.g. int4_g128",
        exit_code=ExitCode.USAGE,
    )
