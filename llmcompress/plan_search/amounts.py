"""Limits as people write them: `60MB`, `0.25x`, `50ms/token`, `20 tokens/s`, `0.4J/token`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmcompress.errors import CompressError, ExitCode

AXES = ("bytes", "memory", "prefill", "decode", "energy")
"""What a plan costs: bytes of the weight files, peak bytes in memory, seconds per token of prefill and of decoding,
joules per token."""

_BYTES = {
    "": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40,
}  # fmt: skip
_SECONDS = {"": 1.0, "S": 1.0, "MS": 1e-3, "US": 1e-6, "ΜS": 1e-6}
_JOULES = {"": 1.0, "J": 1.0, "MJ": 1e-3}
_UNITS = {"bytes": _BYTES, "memory": _BYTES, "prefill": _SECONDS, "decode": _SECONDS, "energy": _JOULES}
_EXAMPLES = {"bytes": "60MB", "memory": "4GB", "prefill": "1ms/token", "decode": "50ms/token", "energy": "0.4J/token"}
_PER_SECOND = ("TOKENS/S", "TOKEN/S", "TOK/S", "T/S")


@dataclass(frozen=True)
class Amount:
    """A number on one axis, or a fraction of what the dense model costs."""

    value: float
    is_share: bool = False

    def of(self, dense: float) -> float:
        """The number itself, where the dense model costs so much."""
        return self.value * dense if self.is_share else self.value


def read_amount(text: str | float, axis: str) -> Amount:
    """`60MB` or `0.25x` as a number of bytes; times and energies per token likewise.

    Raises: CompressError for anything else.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*([^\s].*?)?\s*", str(text))
    if found is None:
        raise _refused(text, axis)
    number, unit = float(found[1]), (found[2] or "").upper()
    if unit == "X":
        return Amount(number, is_share=True)
    if axis in ("prefill", "decode") and unit in _PER_SECOND and number > 0:
        return Amount(1.0 / number)
    unit = re.sub(r"\s*/\s*TOKEN$", "", unit) if axis not in ("bytes", "memory") else unit
    if unit not in _UNITS[axis]:
        raise _refused(text, axis)
    return Amount(number * _UNITS[axis][unit])


def _refused(text: str | float, axis: str) -> CompressError:
    return CompressError(
        "search.amount",
        f"{text!r} is no limit on {axis}",
        fix=f"write e.g. {_EXAMPLES[axis]}, or 0.25x for a quarter of what the dense model takes",
        exit_code=ExitCode.USAGE,
    )
