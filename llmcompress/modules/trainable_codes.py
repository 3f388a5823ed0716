"""The trainable twin of a quantized module. O = outputs, I = inputs, G = groups of inputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import CompressedModule, TrainableTwin
from llmcompress.modules.trainable_roles import Role, TrainableRoles
from llmcompress.numerics.fake_quant import (
    fake_quantized,
    gradient_times,
    restored,
    step_gradient_factor,
    storable_scales,
    storable_zeros,
)
from llmcompress.numerics.grid import Fitted, restore, round_to_codes, spread
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.relaxed_codes import first_position


class CodedModule(CompressedModule):
    """A module whose one matrix is codes and scales."""

    codes_OI: Tensor
    scale_OG: Tensor
    bias: nn.Parameter | None

    @property
    @abstractmethod
    def quantized(self) -> QuantizedTensor:
        """Codes, scales and zero points."""

    @abstractmethod
    def with_codes(self, tensor: QuantizedTensor, bias_O: Tensor | None) -> Self:
        """The same module with other numbers."""

    @abstractmethod
    def computed(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Its forward with that matrix."""

    @override
    def trainable(self, wanted: TrainableRoles) -> TwinOfCodes:
        return TwinOfCodes(self, wanted)


class TwinOfCodes(TrainableTwin):
    """Quantizes its weights in every forward pass, with gradients for weights, scales and zero points.

    Weights start at the dequantized values. If `weights` are not trained, the codes do not change. Static activation
    scales are not trained; inputs beyond them pass their gradient on.

    Source: Esser et al., arXiv 1902.08153 (weights and scales); Chen et al., arXiv 2407.11062 (scales only).
    """

    bias: nn.Parameter | None

    def __init__(self, module: CodedModule, wanted: TrainableRoles) -> None:
        super().__init__(module)
        self._of = (module,)  # in a tuple: its numbers are no part of what is trained
        codes_OI, fitted = module.codes_OI, module.quantized.fitted
        self._dtype = module.scale_OG.dtype
        work = torch.promote_types(self._dtype, torch.float32)
        self._storage = wanted.storage_dtype if self._dtype == work else self._dtype
        first = replace(fitted, scale_OG=fitted.scale_OG.to(work), zero_OG=fitted.zero_OG.to(work))
        self._grid, self._keep_zeros = fitted.grid, wanted.keep_zeros
        self._learns_codes = wanted.matrices in wanted
        if self._learns_codes:
            self._own("latent_OI", restore(codes_OI, first), wanted.matrices, wanted)
        self._own("scale_OG", first.scale_OG, "scales", wanted)
        if not self._grid.symmetric:
            self._own("zero_OG", first.zero_OG, "zero_points", wanted)
        self.register_parameter("bias", None)
        if module.bias is not None:
            self._own("bias", module.bias, "biases", wanted)
        lsq = self._learns_codes and "scales" in wanted
        self._factor = step_gradient_factor(self._grid, *codes_OI.shape) if lsq else 1.0
        self.register_buffer("first_scale_OG", first.scale_OG, persistent=False)
        self.register_buffer("shared", first.shared, persistent=False)

    def _own(self, name: str, first: Tensor, role: Role, wanted: TrainableRoles) -> None:
        self.register_parameter(name, nn.Parameter(first.detach().clone(), requires_grad=role in wanted))
        if role in wanted:
            self.roles[name] = role

    @override
    @torch.no_grad()
    def begin_at(self, weight_OI: Tensor) -> None:
        """Begin where these weights lie between the codes and their neighbours; the codes stay what they are.

        Otherwise weights begin in the middle of their codes, half a step from the next one.
        """
        if not self._learns_codes or self._grid.number is not None:
            return
        fitted, codes_OI = self.fitted(), self._of[0].codes_OI
        scale_OI, zero_OI = (
            spread(each_OG, self._grid, codes_OI.shape[1]) for each_OG in (fitted.scale_OG, fitted.zero_OG)
        )
        beside_OI = first_position(weight_OI / scale_OI + zero_OI - codes_OI)
        self.get_parameter("latent_OI").copy_((codes_OI + beside_OI - zero_OI) * scale_OI)

    def steps_of_codes(self) -> float:
        """The mean distance between two neighbouring values."""
        return float(self.get_parameter("scale_OG").detach().abs().mean())

    def fitted(self) -> Fitted:
        """Scales and zero points as they would be stored now, with their gradients."""
        first_OG, shared = self.get_buffer("first_scale_OG"), self._buffers["shared"]
        scale_OG = gradient_times(self.get_parameter("scale_OG"), self._factor)
        scale_OG = storable_scales(scale_OG, first_OG, self._grid, self._storage, shared)
        if self._grid.symmetric:
            return Fitted(self._grid, scale_OG, torch.zeros_like(first_OG), shared)
        zero_OG = gradient_times(self.get_parameter("zero_OG"), self._factor)
        zero_OG = storable_zeros(zero_OG, scale_OG, self._grid, shared)
        return Fitted(self._grid, scale_OG, zero_OG, shared)

    @override
    def dense_weight(self) -> Tensor:
        fitted = self.fitted()
        weight_OI = fake_quantized(self._latent_OI(), fitted) if self._learns_codes else self._restored(fitted)
        return weight_OI.to(self._dtype)

    def _latent_OI(self) -> Tensor:
        latent_OI = self.get_parameter("latent_OI")
        return latent_OI * self._alive_OI() if self._keep_zeros else latent_OI

    def _restored(self, fitted: Fitted) -> Tensor:
        weight_OI = restored(self._codes_OI(fitted), fitted)
        # a zero point that moves takes the codes of zeros along
        return weight_OI * self._alive_OI() if self._keep_zeros else weight_OI

    def _codes_OI(self, fitted: Fitted) -> Tensor:
        """The module's own, but for zeros that must stay zeros."""
        codes_OI = self._of[0].codes_OI
        if self._grid.symmetric or not self._keep_zeros:
            return codes_OI
        zero_OI = spread(fitted.zero_OG.detach(), self._grid, codes_OI.shape[1]).to(codes_OI.dtype)
        return torch.where(self._alive_OI(), codes_OI, zero_OI)

    def _alive_OI(self) -> Tensor:
        """Where the module's weight is not zero."""
        return self._of[0].quantized.dense() != 0

    @override
    @torch.no_grad()
    def compressed(self) -> CompressedModule:
        fitted, module = self.fitted(), self._of[0]
        codes_OI = self._codes_OI(fitted)
        if self._learns_codes:
            found_OI = round_to_codes(self._latent_OI(), fitted)
            # a format may have two codes for one value, zero above all
            same_OI = self._values(found_OI) == self._values(module.codes_OI)
            codes_OI = torch.where(same_OI, module.codes_OI, found_OI)
        bias_O = None if self.bias is None else self.bias.detach().clone()
        return module.with_codes(QuantizedTensor.of(codes_OI, fitted), bias_O).train(self.training)

    def _values(self, codes_OI: Tensor) -> Tensor:
        number = self._grid.number
        return codes_OI if number is None else number.decode(codes_OI, torch.float32)

    @override
    def forward(self, x: Any) -> Any:
        """What the quantized module would compute."""
        return self._of[0].computed(x, self.dense_weight(), self.bias)
