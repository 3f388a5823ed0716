"""A linear quantized and computed by bitsandbytes. O = outputs, I = inputs, B = blocks of 64 weights.

The package is an optional extra: it is imported when such a linear is created or run, not with this file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec
from llmcompress.modules.expression import Expression, InputTransform
from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.modules.input_transforms import Int8WithOutliers
from llmcompress.numerics.formats import NF4
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.packing import unpack_bits
from llmcompress.numerics.quantized import QuantizedTensor

Kind = Literal["nf4", "int8"]

BLOCK, NESTED_BLOCK = 64, 256
"""Weights per scale, and scales per scale of scales: the package's defaults."""
OUTLIER = 6.0
"""Inputs beyond it are multiplied in float16 (int8 only), as transformers does by default."""


@MODULES.register("bnb_linear")
class BnbLinear(CompressedModule):
    """`nf4`: 4-bit codes of blocks whose scales are themselves codes (double quantization); `int8`: LLM.int8().

    Computes what stock transformers computes with the saved folder: nf4 in the type `compute`, int8 with inputs rounded
    per token. On processors with AVX512-BF16 bitsandbytes has a kernel of its own for nf4, which rounds differently.

    Source: Dettmers et al., arXiv 2305.14314 (NF4, double quantization) and arXiv 2208.07339 (LLM.int8()).
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    bias: nn.Parameter | None

    def __init__(self, kind: Kind, outputs: int, inputs: int, bias_O: Tensor | None, compute: torch.dtype) -> None:
        super().__init__()
        self.kind, self.out_features, self.in_features, self.compute = kind, outputs, inputs, compute
        blocks = -(-outputs * inputs // BLOCK)
        if kind == "nf4":
            self.register_buffer("codes", torch.zeros(-(-outputs * inputs // 2), 1, dtype=torch.uint8))
            self.register_buffer("absmax", torch.zeros(blocks, dtype=torch.uint8))
            self.register_buffer("nested_absmax", torch.ones(-(-blocks // NESTED_BLOCK)))
            self.register_buffer("offset", torch.zeros(()))
        else:
            self.register_buffer("codes", torch.zeros(outputs, inputs, dtype=torch.int8))
            self.register_buffer("absmax", torch.ones(outputs))
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @classmethod
    def quantize(cls, kind: Kind, weight_OI: Tensor, bias_O: Tensor | None, compute: torch.dtype) -> Self:
        """By the package's own functions, from weights in the type that they are stored in."""
        from bitsandbytes import functional as bnb

        outputs, inputs = weight_OI.shape
        made = cls(kind, outputs, inputs, bias_O, compute).to(weight_OI.device)
        stored_OI = weight_OI.to(compute).contiguous()
        if kind == "int8":
            made.codes, made.absmax, _ = bnb.int8_vectorwise_quant(stored_OI.to(torch.float16))
            return made
        made.codes, state = bnb.quantize_4bit(
            stored_OI, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
        )
        made.absmax, made.nested_absmax, made.offset = state.absmax, state.state2.absmax, state.offset
        return made

    @override
    def requantized(self, weight_OI: Tensor, storage_dtype: torch.dtype) -> BnbLinear:
        """By the package again."""
        return self.quantize(self.kind, weight_OI.to(storage_dtype), self.bias, self.compute).train(self.training)

    @override
    def spec(self) -> Spec:
        return {
            "kind": self.kind,
            "outputs": self.out_features,
            "inputs": self.in_features,
            "bias": self.bias is not None,
            "compute": str(self.compute).removeprefix("torch."),
        }

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        outputs, inputs = int(spec["outputs"]), int(spec["inputs"])
        bias_O = torch.zeros(outputs, dtype=dtype) if spec["bias"] else None
        return cls(spec["kind"], outputs, inputs, bias_O, getattr(torch, spec["compute"]))

    @override
    def expression(self) -> Expression:
        if self.kind == "int8":
            tensor = QuantizedTensor(self.codes, (self.absmax / 127)[:, None], None, None, Grid(8))
            return InputTransform(Int8WithOutliers(OUTLIER), Quantized(tensor, bias=self.bias))
        if self.in_features % BLOCK:
            # its blocks cross the ends of rows, which none of our grids can represent; it is still a matrix
            return Dense(self.dense_weight(), bias=self.bias)
        codes_OI = unpack_bits(_halves_swapped(self.codes), 4, 0, self.coded_weights()).view(self.out_features, -1)
        scale_OG = self._scales().view(self.out_features, -1)
        return Quantized(QuantizedTensor(codes_OI, scale_OG, None, None, Grid.of(NF4, BLOCK)), bias=self.bias)

    @override
    def coded_weights(self) -> int:
        return self.out_features * self.in_features

    @override
    def coded_bits(self) -> int:
        scales = [each for name, each in self.named_buffers(recurse=False) if name not in ("codes", "weight")]
        width = 8 if self.kind == "int8" else 4
        return width * self.coded_weights() + sum(8 * each.numel() * each.element_size() for each in scales)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Scales stay float32 whatever the model is cast to: the package accepts no other."""
        scales = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in scales.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def tensors_on_disk(self) -> dict[str, Tensor]:
        """Its tensors as `save_pretrained` of transformers names and stores them, without the bias."""
        if self.kind == "int8":
            return {"weight": self.codes, "SCB": self.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        state = self._state().as_dict(packed=True)
        return {"weight": self.codes, **{f"weight.{name}": tensor for name, tensor in state.items()}}

    @override
    def dense_weight(self) -> Tensor:
        if self.kind == "int8":
            return super().dense_weight()
        from bitsandbytes import functional as bnb

        weight_OI: Tensor = bnb.dequantize_4bit(self.codes, self._state())
        return weight_OI

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "nf4":
            bias_O = None if self.bias is None else self.bias.to(self.compute)
            return functional.linear(x.to(self.compute), self.dense_weight().to(self.compute), bias_O).to(x.dtype)
        import bitsandbytes

        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.codes, self.absmax, OUTLIER
        state.has_fp16_weights = state.is_training = False
        bias_O = None if self.bias is None else self.bias.to(x.dtype)
        with _silent("bitsandbytes.autograd._functions"):  # it says on every call that inputs become float16
            product: Tensor = bitsandbytes.matmul(x, self.codes, bias=bias_O, state=state)
        return product

    def _scales(self) -> Tensor:
        """One for every block, in order."""
        from bitsandbytes import functional as bnb

        state = self._state()
        scales: Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return scales

    def _state(self) -> Any:
        from bitsandbytes import functional as bnb

        device = self.codes.device
        nested = bnb.QuantState(
            absmax=self.nested_absmax.float(),
            blocksize=NESTED_BLOCK,
            code=bnb.create_dynamic_map().to(device),
            dtype=torch.float32,
        )
        return bnb.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.compute,
            blocksize=BLOCK,
            code=bnb.get_4bit_type("nf4", device=device),
            quant_type="nf4",
            offset=self.offset.float(),
            state2=nested,
        )

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, bitsandbytes {self.kind}"


def _halves_swapped(codes: Tensor) -> Tensor:
    """One row of bytes with the first code in the low half, as ours are packed; the package puts it into the high."""
    bytes_1B = codes.reshape(1, -1)
    return (bytes_1B << 4) | (bytes_1B >> 4)


def bnb_linears(model: nn.Module) -> dict[str, BnbLinear]:
    """Full name → everything that holds such codes."""
    return {name: part for name, part in model.named_modules() if isinstance(part, BnbLinear)}


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
