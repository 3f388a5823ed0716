"""Named quantization schemes: what `scheme: int4_g128` in a recipe means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llmcompress.errors import CompressError, ExitCode
from llmcompress.numerics.grid import Grid

Activations = Literal["token", "tensor"]
"""int8 activations: one scale per token, found while running; or one per tensor, fixed by calibration."""

_NAME = re.compile(r"int(?P<bits>[2348])_(?:g(?P<group>[1-9]\d*)|channel)(?P<asym>_asym)?(?:_a8(?P<a8>token|tensor))?")


@dataclass(frozen=True)
class Scheme:
    """A weight grid, and how activations are rounded (None: not at all)."""

    weights: Grid
    activations: Activations | None = None

    @property
    def name(self) -> str:
        """The name that `named_scheme` reads back."""
        size = "channel" if self.weights.group is None else f"g{self.weights.group}"
        asym = "" if self.weights.symmetric else "_asym"
        return f"int{self.weights.bits}_{size}{asym}" + (f"_a8{self.activations}" if self.activations else "")

    def bits_per_weight(self, outputs: int, inputs: int, scale_bits: int) -> float:
        """Stored bits ÷ weights: codes, scales and (asymmetric) packed zero points."""
        per_group = scale_bits + (0 if self.weights.symmetric else self.weights.bits)
        return self.weights.bits + per_group * self.weights.groups(inputs) / inputs


def named_scheme(name: str) -> Scheme:
    """Read `int{2,3,4,8}_{gN,channel}[_asym][_a8{token,tensor}]`.

    Raises: CompressError for any other name.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise CompressError(
            "scheme.unknown",
            f"{name!r} is not a quantization scheme",
            fix="write int{2,3,4,8}_{gN|channel}[_asym][_a8token|_a8tensor], e.g. int4_g128, int8_channel_a8token",
            exit_code=ExitCode.USAGE,
        )
    group = int(found["group"]) if found["group"] else None
    activations: Activations | None = found["a8"]  # type: ignore[assignment]
    return Scheme(Grid(int(found["bits"]), symmetric=not found["asym"], group=group), activations)
