"""The tensors of a quantized linear in a GPTQ checkpoint. O = outputs, I = inputs, G = groups of inputs, W = words.

Fields are unsigned: code + 2^(bits-1), packed along inputs, lowest bits first, into int32 words; a field of three bits
may lie in two words. `qzeros` are packed the same way along outputs; version 1 stores them less one, version 2 as they
are.

Source: Frantar et al. 2023, "GPTQ", whose code AutoGPTQ, GPTQModel and vLLM read; tests compare with plain loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.formats.named import Kind, Named, empty_codes, kinds
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.packing import pack_bits, unpack_bits
from llmcompress.numerics.quantized import QuantizedTensor, regrouped

Version = Literal[1, 2]
WIDTHS = (2, 3, 4, 8)
"""Bits of a field that every reader knows."""
NAMES = frozenset({"qweight", "qzeros", "scales", "g_idx"})
"""What `pack` returns besides the bias."""
SCALES = torch.float16


@dataclass(frozen=True)
class Layout:
    """How a linear is stored."""

    bits: int
    """Of a field."""
    group: int | None
    """Inputs that share a scale in the file; None: the whole row."""
    symmetric: bool
    """Every zero point is the middle of the fields."""
    version: Version = 1

    @property
    def grid(self) -> Grid:
        """As a reader sees it."""
        return Grid(self.bits, self.symmetric, self.group)


def width_of(grid: Grid) -> int | None:
    """The narrowest field that holds every code; None: no integers, or one scale of the whole matrix."""
    if grid.number is not None or grid.scales.single:
        return None
    return next(width for width in WIDTHS if width >= grid.bits)


def pack(form: Quantized, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes and zero points unchanged, scales in float16, and a bias in `dtype`.

    Inputs and outputs must be multiples of 32. In version 1 no zero point may be the lowest code of the fields.
    """
    tensor, middle = regrouped(form.tensor, layout.group), 1 << (layout.bits - 1)
    zero_OG = torch.full_like(tensor.scale, middle, dtype=torch.int16)
    if tensor.zero_point is not None:
        zero_OG = tensor.zero_point.to(torch.int16) + middle
    tensors = {
        "qweight": _words(tensor.codes, layout.bits, -middle).T.contiguous(),
        "qzeros": _words(zero_OG.T - (2 - layout.version), layout.bits, 0),
        "scales": tensor.scale.to(SCALES).T.contiguous(),
        "g_idx": torch.arange(tensor.shape[1], dtype=torch.int32, device=tensor.codes.device)
        // tensor.grid.length(tensor.shape[1]),
    }
    return tensors if form.bias is None else {**tensors, "bias": form.bias.detach().to(dtype)}


def unpack(found: Named, layout: Layout, dtype: torch.dtype = SCALES) -> QuantizedTensor:
    """Codes, scales and zero points as a reader sees them; scales in `dtype`."""
    middle, outputs, inputs = (
        1 << (layout.bits - 1),
        found["qweight"].shape[1],
        found["qweight"].shape[0] * 32 // layout.bits,
    )
    codes_OI = _fields(found["qweight"].T, layout.bits, -middle, inputs)
    zero_OG = None
    if not layout.symmetric:
        zero_GO = _fields(found["qzeros"], layout.bits, (2 - layout.version) - middle, outputs)
        zero_OG = zero_GO.T.contiguous()
    return QuantizedTensor(codes_OI, found["scales"].T.contiguous().to(dtype), zero_OG, None, layout.grid)


@cache
def tensors(
    shape: tuple[int, int], scheme: Scheme, layout: Layout, dtype: torch.dtype, *, bias: bool
) -> dict[str, Kind]:
    """Names, dtypes and shapes of what `pack` gives for a linear of that shape (O, I)."""
    return kinds(pack(empty_codes(shape, scheme, dtype, bias=bias), layout, dtype))


def _words(codes_OI: Tensor, bits: int, low: int) -> Tensor:
    """O×W int32."""
    packed_OB = pack_bits(codes_OI, bits, low)
    return functional.pad(packed_OB, (0, -packed_OB.shape[1] % 4)).contiguous().view(torch.int32)


def _fields(words_OW: Tensor, bits: int, low: int, count: int) -> Tensor:
    """O×I int8."""
    return unpack_bits(words_OW.contiguous().view(torch.uint8), bits, low, count)
