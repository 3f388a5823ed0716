"""A linear with a codebook for each column, or one for all, and some weights in full precision.

A research format: exact about bytes, slow to run. O = outputs, I = inputs, C = columns of one bit width, L = levels,
N = weights in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.expression import Expression
from llmcompress.modules.expression_leaves import Codebook, ColumnCodes
from llmcompress.modules.trainable import sharing_tensors
from llmcompress.modules.trainable_roles import Role, TrainableRoles
from llmcompress.numerics.fake_quant import straight_through
from llmcompress.numerics.packing import pack_bits, packed_bytes, unpack_bits


@MODULES.register("codebook_linear")
class CodebookLinear(CompressedModule):
    """`width_I` gives the bit width of each column's codes; codes are packed, column by column, per width.

    Levels are C×L, or 1×L where all columns share one codebook. Weights at the flat positions `place_N` are `value_N`,
    regardless of their codes. The module stores in memory what is stored on disk; the dense weight is computed in every
    call.
    """

    width_I: Tensor
    place_N: Tensor
    value_N: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        outputs: int,
        width_I: Tensor,
        codes: Mapping[int, Tensor],
        levels: Mapping[int, Tensor],
        place_N: Tensor,
        value_N: Tensor,
        bias_O: Tensor | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = outputs, len(width_I)
        self.widths = tuple(sorted(codes))
        self.register_buffer("width_I", width_I)
        for bits in self.widths:
            self.register_buffer(f"codes_{bits}", codes[bits])
            self.register_buffer(f"levels_{bits}", levels[bits])
        self.register_buffer("place_N", place_N)
        self.register_buffer("value_N", value_N)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @classmethod
    def from_codes(
        cls,
        codes_IO: Tensor,
        width_I: Tensor,
        levels: Mapping[int, Tensor],
        place_N: Tensor,
        value_N: Tensor,
        bias_O: Tensor | None,
    ) -> CodebookLinear:
        """From unpacked codes; `levels` are C×L for the columns of each width, in order."""
        packed = {bits: pack_bits(codes_IO[width_I == bits], bits, 0) for bits in levels}
        return cls(codes_IO.shape[1], width_I.to(torch.uint8), packed, levels, place_N.to(torch.int32), value_N, bias_O)

    @override
    def spec(self) -> Spec:
        return {
            "outputs": self.out_features,
            "columns": {str(bits): len(self.get_buffer(f"codes_{bits}")) for bits in self.widths},
            "full": len(self.place_N),
            "bias": self.bias is not None,
            **({"shared": True} if self._is_shared else {}),
        }

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> CodebookLinear:
        outputs = int(spec["outputs"])
        columns = {int(bits): int(count) for bits, count in spec["columns"].items()}
        rows = {bits: 1 if spec.get("shared") else count for bits, count in columns.items()}
        return cls(
            outputs,
            torch.zeros(sum(columns.values()), dtype=torch.uint8),
            {b: torch.zeros(count, packed_bytes(outputs, b), dtype=torch.uint8) for b, count in columns.items()},
            {b: torch.zeros(rows[b], 1 << b, dtype=dtype) for b in columns},
            torch.zeros(int(spec["full"]), dtype=torch.int32),
            torch.zeros(int(spec["full"]), dtype=dtype),
            torch.zeros(outputs, dtype=dtype) if spec["bias"] else None,
        )

    @property
    def _is_shared(self) -> bool:
        """Whether all columns have one codebook."""
        return self.in_features > 1 and all(len(self.get_buffer(f"levels_{bits}")) == 1 for bits in self.widths)

    @override
    def expression(self) -> Expression:
        codes = {bits: self.codes_of(bits) for bits in self.widths}
        levels = {bits: self.get_buffer(f"levels_{bits}") for bits in self.widths}
        return self.composed(codes, levels, self.value_N, self.bias)

    def composed(
        self, codes: Mapping[int, Tensor], levels: Mapping[int, Tensor], value_N: Tensor, bias_O: Tensor | None
    ) -> Codebook:
        """Of the `codes_of` each width, these levels (C×L for its columns) and these weights in full."""
        columns = tuple(
            ColumnCodes(self.width_I == bits, codes[bits], levels_CL.expand(len(codes[bits]), -1))
            for bits, levels_CL in levels.items()
        )
        return Codebook(columns, self.place_N, value_N, (self.out_features, self.in_features), bias=bias_O)

    def codes_of(self, bits: int) -> Tensor:
        """Unpacked, C×O int16, of the columns of one width."""
        # codes of eight bits come back as int8, shifted by half their range
        low = -128 if bits == 8 else 0
        return unpack_bits(self.get_buffer(f"codes_{bits}"), bits, low, self.out_features).to(torch.int16) - low

    @override
    def coded_weights(self) -> int:
        return self.out_features * self.in_features

    @override
    def coded_bits(self) -> int:
        """Of everything but the bias, as files hold it."""
        return sum(8 * buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @override
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense_weight(), self.bias)

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfCodebooks(self, wanted)

    @override
    def extra_repr(self) -> str:
        widths = ", ".join(f"{count} columns of {bits} bits" for bits, count in self.spec()["columns"].items())
        return f"{self.in_features} → {self.out_features}, {widths}, {len(self.place_N)} weights in full"


class TwinOfCodebooks(TrainableTwin):
    """Levels count as scales and weights in full as weights; which level a weight has stays what it is."""

    def __init__(self, module: CodebookLinear, wanted: TrainableRoles) -> None:
        super().__init__(module)
        self._of, self._storage, self._keep_zeros = (module,), wanted.storage_dtype, wanted.keep_zeros
        # unpacking takes longer than a matrix product of a small batch, and codes do not change here
        self._codes = {bits: module.codes_of(bits) for bits in module.widths}
        levels = {f"levels_{bits}": module.get_buffer(f"levels_{bits}") for bits in module.widths}
        for name, tensor in (*levels.items(), ("value_N", module.value_N), ("bias", module.bias)):
            role: Role = "scales" if name in levels else "biases" if name == "bias" else "weights"
            own = None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=role in wanted)
            self.register_parameter(name, own)
            if own is not None and own.numel() and role in wanted:
                self.roles[name] = role

    def _stored(self, name: str) -> Tensor:
        """The values that would be stored now; the gradient passes."""
        first = self._of[0].get_buffer(name)
        trained: Tensor = self.get_parameter(name)
        exact = (
            trained * (first != 0) if self._keep_zeros else trained
        )  # after a sparse pass zero is a level of its own
        near = exact.detach().to(self._storage).to(exact.dtype)
        return straight_through(exact, torch.where(exact.detach() == first, first, near))

    def _codebook(self) -> Codebook:
        module = self._of[0]
        levels = {bits: self._stored(f"levels_{bits}") for bits in module.widths}
        return module.composed(self._codes, levels, self._stored("value_N"), self._parameters["bias"])

    @override
    def dense_weight(self) -> Tensor:
        return self._codebook().dense_weight()

    @override
    @torch.no_grad()
    def compressed(self) -> CompressedModule:
        made = sharing_tensors(self._of[0])
        for name in ("value_N", *(f"levels_{bits}" for bits in self._of[0].widths)):
            made._buffers[name] = self._stored(name)
        bias = self._parameters["bias"]
        made._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return made.train(self.training)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._codebook()(x)
