"""Floats of few bits, from their definition and one value at a time, in Python's own float64."""

from __future__ import annotations

import math
from collections.abc import Sequence


def float_values(exponent_bits: int, mantissa_bits: int, *, infinities: bool, most: float) -> list[float]:
    """Every value by its bit pattern; NaN where the pattern is none (or infinite)."""
    values = []
    bias = 2 ** (exponent_bits - 1) - 1
    for sign in (1.0, -1.0):
        for exponent in range(2**exponent_bits):
            for mantissa in range(2**mantissa_bits):
                share = mantissa / 2**mantissa_bits
                value = 2.0 ** (1 - bias) * share if exponent == 0 else 2.0 ** (exponent - bias) * (1 + share)
                special = infinities and exponent == 2**exponent_bits - 1
                values.append(math.nan if special or value > most else sign * value)
    return values


E4M3 = float_values(4, 3, infinities=False, most=448)
E5M2 = float_values(5, 2, infinities=True, most=57344)
E2M1 = float_values(2, 1, infinities=False, most=6)


def nearest(value: float, values: Sequence[float]) -> float:
    """By trying all; of two equally near the one with the even pattern."""
    codes = [code for code, each in enumerate(values) if not math.isnan(each)]
    return values[min(codes, key=lambda code: (abs(values[code] - value), code % 2, abs(values[code]), code))]
