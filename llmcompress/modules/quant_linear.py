"""A linear whose weight is integer codes and scales: runs exactly what will be shipped. O = outputs, I = inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.numerics.grid import Fitted, restore


@MODULES.register("quant_linear")
class QuantLinear(CompressedModule):
    """Replaces `nn.Linear` (or Conv1D): `codes_OI` int8, `scale_OG`, `zero_OG` int8 (asymmetric), optional bias.

    `input_scale` exists for static activations only. Buffers follow `.to(dtype)`: scales hold values of the
    checkpoint's dtype, so casting the module there and back loses nothing.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    bias: nn.Parameter | None
    input_scale: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        codes_OI: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor | None,
        bias_O: Tensor | None,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = codes_OI.shape
        self.register_buffer("codes_OI", codes_OI)
        self.register_buffer("scale_OG", scale_OG)
        self.register_buffer("zero_OG", zero_OG)
        self.register_buffer("input_scale", input_scale)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @classmethod
    def from_fitted(
        cls, scheme: Scheme, codes_OI: Tensor, fitted: Fitted, bias_O: Tensor | None, input_scale: Tensor | None = None
    ) -> QuantLinear:
        """From the result of rounding."""
        zero_OG = None if scheme.weights.symmetric else fitted.zero_OG.to(torch.int8)
        return cls(scheme, codes_OI, fitted.scale_OG, zero_OG, bias_O, input_scale)

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
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> QuantLinear:
        scheme = named_scheme(str(spec["scheme"]))
        outputs, inputs = int(spec["outputs"]), int(spec["inputs"])
        shape = (outputs, scheme.weights.groups(inputs))
        return cls(
            scheme,
            torch.zeros(outputs, inputs, dtype=torch.int8),
            torch.ones(shape, dtype=dtype),
            None if scheme.weights.symmetric else torch.zeros(shape, dtype=torch.int8),
            torch.zeros(outputs, dtype=dtype) if spec["bias"] else None,
            torch.ones(1, dtype=dtype) if scheme.activations == "tensor" else None,
        )

    @override
    def keeps_inputs(self) -> bool:
        return self.scheme.activations is None

    @override
    def dense_weight(self) -> Tensor:
        zero_OG = torch.zeros_like(self.scale_OG) if self.zero_OG is None else self.zero_OG.to(self.scale_OG.dtype)
        return restore(self.codes_OI, Fitted(self.scheme.weights, self.scale_OG, zero_OG))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Some model code reads `linear.weight.dtype` or its device."""
        return self.dense_weight()

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.activations:
            x = round_activations(x, self.input_scale)
        return functional.linear(x, self.dense_weight(), self.bias)

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.scheme.name}"


def round_activations(x: Tensor, scale: Tensor | None) -> Tensor:
    """int8 round trip of activations: per token when `scale` is None, else with that one scale.

    Same arithmetic as compressed-tensors (scale = largest magnitude ÷ 127.5, codes -128 … 127), so a model loaded
    by stock transformers gives the logits measured here.
    """
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)
    return (x / scale).clamp_(-128, 127).round_() * scale
