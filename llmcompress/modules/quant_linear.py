"""A quantized linear: computes exactly what the saved model computes. O = outputs, I = inputs."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, Spec
from llmcompress.modules.expression import Expression
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.modules.trainable_codes import CodedModule
from llmcompress.numerics.grid import Fitted, round_to_codes
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.ranges import fit


@MODULES.register("quant_linear")
class QuantLinear(CodedModule):
    """Replaces `nn.Linear` (or Conv1D): `codes_OI` int8, `scale_OG`, `zero_OG` int8 (asymmetric), optional bias.

    `input_scale` exists for calibrated activations. Buffers follow `.to(dtype)`: scales have values of the checkpoint's
    dtype, so casting the module there and back loses nothing. The float32 numbers of the second level of scales
    (`shared_scale`, and `input_scale` of such activations) would lose precision: its bits are stored as int32.
    """

    has_stock_format: ClassVar[bool] = True
    holds_codes: ClassVar[bool] = True

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    bias: nn.Parameter | None
    input_scale: Tensor | None
    shared_scale: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        codes_OI: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor | None,
        bias_O: Tensor | None,
        input_scale: Tensor | None = None,
        shared_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = codes_OI.shape
        self.register_buffer("codes_OI", codes_OI)
        self.register_buffer("scale_OG", scale_OG)
        self.register_buffer("zero_OG", zero_OG)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("shared_scale", shared_scale)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @classmethod
    def from_fitted(
        cls, scheme: Scheme, codes_OI: Tensor, fitted: Fitted, bias_O: Tensor | None, input_scale: Tensor | None = None
    ) -> Self:
        """From the result of rounding; `input_scale` is `fixed_scale` of the inputs."""
        tensor = QuantizedTensor.of(codes_OI, fitted)
        if input_scale is not None and scheme.activations == "group":
            input_scale = as_bits(input_scale)
        shared = None if tensor.shared_scale is None else as_bits(tensor.shared_scale)
        return cls(scheme, codes_OI, tensor.scale, tensor.zero_point, bias_O, input_scale, shared)

    def _guard(self) -> None:
        """None here: `weight` is what the codes stand for, and files hold the codes themselves under that name."""

    @override
    def spec(self) -> Spec:
        return {
            "scheme": self.scheme.name,
            "outputs": self.out_features,
            "inputs": self.in_features,
            "bias": self.bias is not None,
        }

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        scheme = named_scheme(str(spec["scheme"]))
        outputs, inputs = int(spec["outputs"]), int(spec["inputs"])
        shape, shared = scheme.weights.scale_shape(outputs, inputs), scheme.weights.shared_shape(outputs, inputs)
        bits = torch.int32 if scheme.activations == "group" else dtype
        return cls(
            scheme,
            torch.zeros(outputs, inputs, dtype=torch.int8),
            torch.ones(shape, dtype=dtype),
            None if scheme.weights.symmetric else torch.zeros(shape, dtype=torch.int8),
            torch.zeros(outputs, dtype=dtype) if spec["bias"] else None,
            torch.ones(1, dtype=bits) if scheme.measures_inputs else None,
            None if shared is None else torch.ones(shared, dtype=torch.int32),
        )

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes, scales and zero points."""
        shared = None if self.shared_scale is None else from_bits(self.shared_scale)
        return QuantizedTensor(self.codes_OI, self.scale_OG, self.zero_OG, shared, self.scheme.weights)

    @override
    def expression(self) -> Expression:
        return self.leaf()

    def leaf(self) -> Quantized:
        """Codes with their bias and the rounding of their inputs."""
        fixed = self.input_scale
        if fixed is not None and fixed.dtype == torch.int32:
            fixed = from_bits(fixed)
        return Quantized(self.quantized, self.scheme.activations, fixed, bias=self.bias)

    @override
    def dense_weight(self) -> Tensor:
        return self.quantized.dense()

    @override
    def coded_weights(self) -> int:
        return self.quantized.weights

    @override
    def coded_bits(self) -> int:
        fixed = self.input_scale
        return self.quantized.bits + (0 if fixed is None else 8 * fixed.numel() * fixed.element_size())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Some model code reads `linear.weight.dtype` or its device."""
        return self.dense_weight()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.expression()(x)

    @override
    def computed(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return functional.linear(self.leaf().rounded(x), weight_OI, bias_O)

    @override
    def requantized(self, weight_OI: Tensor, storage_dtype: torch.dtype) -> QuantLinear:
        """To nearest, on ranges of the least squared error; fixed ranges of inputs stay."""
        weight_OI = weight_OI.float()
        fitted = fit(weight_OI, self.scheme.weights, scale_dtype=storage_dtype, search="mse")
        made = self.from_fitted(self.scheme, round_to_codes(weight_OI, fitted), fitted, self.bias)
        made.input_scale = self.input_scale
        return made.train(self.training)

    @override
    def with_codes(self, tensor: QuantizedTensor, bias_O: Tensor | None) -> Self:
        scale_OG = tensor.scale.to(self.scale_OG.dtype)
        codes_OI, zero_OG = tensor.codes, tensor.zero_point
        return type(self)(self.scheme, codes_OI, scale_OG, zero_OG, bias_O, self.input_scale, self.shared_scale)

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.scheme.name}"


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Full name → everything below a module that holds codes and scales, tables of embeddings too."""
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantLinear)}


def codes_of(module: nn.Module) -> QuantLinear:
    """A module of which the caller knows that it holds codes and scales."""
    assert isinstance(module, QuantLinear), f"a {type(module).__name__} holds no codes"
    return module


def as_bits(value: Tensor) -> Tensor:
    """A float32 as an int32 that no cast of floating tensors touches."""
    return value.float().view(torch.int32)


def from_bits(bits: Tensor) -> Tensor:
    """The float32 that `as_bits` was given."""
    return bits.view(torch.float32)
