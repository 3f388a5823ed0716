"""The nodes of an ONNX graph that compute what a module computes, and the tensors that they read.

O = outputs, I = inputs, B = blocks of a row, D = width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, singledispatchmethod
from typing import Any

import torch
from torch import Tensor

from llmcompress.exporters.onnx_package import onnx_package
from llmcompress.formats import onnx as fields
from llmcompress.formats.onnx import NBits, layout
from llmcompress.modules.expression import Chain, Expression, Gather, InputTransform, OutputPlaces, Sum, Tied
from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.modules.input_transforms import Hadamard, Selection
from llmcompress.numerics.hadamard import transformed
from llmcompress.numerics.quantized import QuantizedTensor

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
_INT8_REACH = 127.5
_LEAST_SCALE = 1e-30


@dataclass(frozen=True)
class Held:
    """One tensor of the file; its numbers are made when they are asked for."""

    name: str
    source: str
    """The module, or parameter, that it came from."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class HeldCodes:
    """A matrix of codes: its tensors are `source.codes`, `source.scales` and, of an asymmetric grid, `source.zeros`."""

    source: str
    tensor: QuantizedTensor
    kind: NBits | None
    """None: int8 as it is, inputs × outputs, with one scale for every output."""


@dataclass
class Nodes:
    """Collects nodes and tensors while holes are filled."""

    storage_dtype: torch.dtype
    """In which dense weights are stored by every other format too; here they are float32 with the same values."""
    accuracy_level: int
    """Of MatMulNBits: 4 rounds activations to 8 bits, 0 does not."""
    nodes: list[Any] = field(default_factory=list)
    held: dict[str, Held] = field(default_factory=dict)
    codes: dict[str, HeldCodes] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    """Embeddings whose table the head multiplies by."""
    accuracy_level_of_8_bits: int | None = None
    """The same of fields of 8 bits; None: as of all others."""

    def fill(self, form: Expression, name: str, x: str, y: str) -> list[Any]:
        """Nodes that compute `y` from `x`, the input of the module called `name`."""
        self.nodes = []
        found = self._emit(form, name, x)
        last = self.nodes[-1]
        assert last.output[0] == found
        last.output[0] = y
        return self.nodes

    @singledispatchmethod
    def _emit(self, form: Expression, name: str, x: str) -> str:
        """The name of the result; a form without a method of its own is one matrix."""
        return self._one_matrix(form, name, x)

    @_emit.register
    def _(self, form: Chain, name: str, x: str) -> str:
        for number, link in enumerate(form.links):
            x = self._emit(link, f"{name}/{number}", x)
        return x

    @_emit.register
    def _(self, form: Sum, name: str, x: str) -> str:
        total, *rest = (self._emit(term, f"{name}/{number}", x) for number, term in enumerate(form.terms))
        for each in rest:
            total = self._node("Add", [total, each], name)
        return total

    @_emit.register
    def _(self, form: InputTransform, name: str, x: str) -> str:
        change = form.change
        if isinstance(change, Selection):
            index = self._constant(f"{name}.selected", name, change.index_K.long())
            return self._emit(form.inner, name, self._node("Gather", [x, index], name, axis=-1))
        if isinstance(change, Hadamard):
            matrix = self._constant(f"{name}.hadamard", name, transformed(torch.eye(change.width), change.width))
            pieces = self._node("Reshape", [x, self._ints([-1, change.width])], name)
            turned = self._node("MatMul", [pieces, matrix], name)
            whole = self._node("Reshape", [turned, self._node("Shape", [x], name)], name)
            return self._emit(form.inner, name, whole)
        return self._one_matrix(form, name, x)

    @_emit.register
    def _(self, form: OutputPlaces, name: str, x: str) -> str:
        kept = self._emit(form.inner, f"{name}/kept", x)
        places = torch.full((form.outputs,), len(form.index_K), dtype=torch.int64)
        places[form.index_K.cpu()] = torch.arange(len(form.index_K))
        index = self._constant(f"{name}.places", name, places)
        with_zero = self._node("Pad", [kept, self._ints([0, 1]), "", self._ints([-1])], name)
        return self._node("Gather", [with_zero, index], name, axis=-1)

    @_emit.register
    def _(self, form: Tied, name: str, x: str) -> str:
        inner = form.inner
        if isinstance(inner, Quantized) and (kind := layout(inner.tensor.grid, inner.shape[1], looks_up=True)):
            return self._biased(self._n_bits(inner, kind, form.owner, name, x), inner.bias, name)
        return self._biased(self._times_rows(x, self._table(form.owner, inner), name), inner.dense_bias(), name)

    @_emit.register
    def _(self, form: Gather, name: str, x: str) -> str:
        table = form.table
        found = self._rows(table, name, x) if isinstance(table, Quantized) else None
        if found is None:
            found = self._node("Gather", [self._table(name, table), x], name)
            if self.held[f"{name}.weight"].dtype != torch.float32:
                found = self._node("Cast", [found], name, to=onnx_package().TensorProto.FLOAT)
        if form.multiplier == 1.0:
            return found
        return self._node("Mul", [found, self._constant(f"{name}.by", name, torch.tensor(form.multiplier))], name)

    @_emit.register
    def _(self, form: Quantized, name: str, x: str) -> str:
        grid, inputs = form.tensor.grid, form.shape[1]
        if fields.multiplies_integers(form.scheme, inputs):
            return self._biased(self._int8_products(form, name, x), form.bias, name)
        kind = layout(grid, inputs)
        if kind is None:
            return self._one_matrix(form, name, x)
        return self._biased(self._n_bits(form, kind, name, name, x), form.bias, name)

    def _times_rows(self, x: str, table: str, name: str) -> str:
        """Products with the rows of a table."""
        return self._node("FusedMatMul", [x, table], name, domain=MICROSOFT, transB=1)

    def _n_bits(self, form: Quantized, kind: NBits, owner: str, name: str, x: str) -> str:
        """MatMulNBits on the fields that `owner` has."""
        names, (outputs, inputs) = self._fields(form.tensor, kind, owner), form.shape
        sizes = {"K": inputs, "N": outputs, "bits": kind.bits, "block_size": kind.block}
        of_8_bits = self.accuracy_level_of_8_bits
        level = self.accuracy_level if of_8_bits is None or kind.bits < fields.WIDTHS[-1] else of_8_bits
        sizes["accuracy_level"] = level
        return self._node("MatMulNBits", [x, *names], name, domain=MICROSOFT, **sizes)

    def _rows(self, table: Quantized, name: str, ids: str) -> str | None:
        """Rows of a table of codes; None where the operator has no such form."""
        kind = layout(table.tensor.grid, table.shape[1], looks_up=True)
        if kind is None:
            return None
        codes, *others = self._fields(table.tensor, kind, name)
        # the operator counts along the last axis, which the codes have and what belongs to a block gets
        more = [self._node("Unsqueeze", [each, self._ints([-1])], name) for each in others]
        options = {"bits": kind.bits, "block_size": kind.block, "gather_axis": 0, "quantize_axis": 2}
        blocks = self._node("GatherBlockQuantized", [codes, ids, *more], name, domain=MICROSOFT, **options)
        leading = self._node("Shape", [ids], name)
        shape = self._node("Concat", [leading, self._ints([table.shape[1]])], name, axis=0)
        return self._node("Reshape", [blocks, shape], name)

    def _int8_products(self, form: Quantized, name: str, x: str) -> str:
        """Activations to int8 with one scale a token, or a calibrated one, and products of integers.

        They are stored with an offset of 128: signed ones have no fast kernel on x86 (docs/log.md, 2026-11-30).
        """
        tensor, outputs = form.tensor, form.shape[0]
        self.codes[name] = HeldCodes(name, tensor, None)
        codes = self._hold(f"{name}.codes", name, (form.shape[1], outputs), torch.int8, lambda: tensor.codes.T)
        scales = self._hold(f"{name}.scales", name, (outputs,), torch.float32, lambda: tensor.scale.float()[:, 0])
        offset = self._constant("llmcompress.uint8.128", "", torch.tensor(128, dtype=torch.uint8))
        if form.input_scale is not None:
            scale = self._constant(f"{name}.input_scale", name, form.input_scale.detach().float().reshape(()))
            rounded = self._node("QuantizeLinear", [x, scale, offset], name)
            return self._integer_products([rounded, codes, scale, scales, offset], name)
        largest = self._node("ReduceMax", [self._node("Abs", [x], name), self._ints([-1])], name, keepdims=1)
        reach = self._node("Div", [largest, self._float(_INT8_REACH)], name)
        scale, one = self._node("Max", [reach, self._float(_LEAST_SCALE)], name), self._float(1.0)
        rounded = self._node("QuantizeLinear", [self._node("Div", [x, scale], name), one, offset], name)
        return self._node("Mul", [self._integer_products([rounded, codes, one, scales, offset], name), scale], name)

    def _integer_products(self, inputs: Sequence[str], name: str) -> str:
        return self._node("MatMulIntegerToFloat", inputs, name, domain=MICROSOFT)

    def _one_matrix(self, form: Expression, name: str, x: str) -> str:
        """An ordinary product; the file has inputs × outputs."""
        outputs, inputs = form.shape
        held = self._hold(f"{name}.weight", name, (inputs, outputs), torch.float32, lambda: self._values(form).T)
        return self._biased(self._node("MatMul", [x, held], name), form.dense_bias(), name)

    def _table(self, owner: str, table: Expression) -> str:
        """The rows of an embedding: float32 where the head multiplies by them, else as they are stored elsewhere."""
        dtype = self.storage_dtype if isinstance(table, Dense) and owner not in self.tied else torch.float32
        return self._hold(f"{owner}.weight", owner, table.shape, dtype, lambda: self._values(table).to(dtype))

    def _values(self, form: Expression) -> Tensor:
        """Float32: an ordinary weight as it is stored elsewhere; what codes stand for is not rounded again."""
        weight = form.dense_weight().detach()
        return (weight.to(self.storage_dtype) if isinstance(form, Dense) else weight).float()

    def _fields(self, tensor: QuantizedTensor, kind: NBits, owner: str) -> list[str]:
        """The names of its tensors, which a tied head shares with the embedding."""
        (outputs, inputs), codes, scales = tensor.shape, f"{owner}.codes", f"{owner}.scales"
        blocks = kind.blocks(inputs)
        self.codes[owner] = HeldCodes(owner, tensor, kind)
        shape = (outputs, blocks, kind.bytes)
        names = [
            self._hold(codes, owner, shape, torch.uint8, partial(fields.packed_codes, tensor, kind)),
            self._hold(scales, owner, shape[:2], torch.float32, partial(fields.block_scales, tensor, kind)),
        ]
        if tensor.zero_point is not None:
            wide = (outputs, -(-blocks * kind.bits // 8))
            names.append(self._hold(f"{owner}.zeros", owner, wide, torch.uint8, partial(_zeros, tensor, kind)))
        return names

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.storage_dtype).float()

    def _biased(self, y: str, bias_O: Tensor | None, name: str) -> str:
        if bias_O is None:
            return y
        bias = self._hold(f"{name}.bias", name, tuple(bias_O.shape), torch.float32, partial(self._stored, bias_O))
        return self._node("Add", [y, bias], name)

    def _ints(self, values: Sequence[int]) -> str:
        name = "llmcompress.ints." + "_".join(map(str, values))
        return self._constant(name, "", torch.tensor(values, dtype=torch.int64))

    def _float(self, value: float) -> str:
        return self._constant(f"llmcompress.float.{value:g}", "", torch.tensor(value))

    def _constant(self, name: str, source: str, value: Tensor) -> str:
        value = value.detach().cpu().contiguous()
        return self._hold(name, source, tuple(value.shape), value.dtype, lambda: value)

    def _hold(
        self, name: str, source: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> str:
        self.held.setdefault(name, Held(name, source, shape, dtype, make))
        return name

    def _node(self, kind: str, inputs: Sequence[str], name: str, *, domain: str = "", **options: Any) -> str:
        number = len(self.nodes)
        output = f"/{name}/{number}/{kind}"
        node = onnx_package().helper.make_node(kind, list(inputs), [output], output, domain=domain, **options)
        self.nodes.append(node)
        return output


def _zeros(tensor: QuantizedTensor, kind: NBits) -> Tensor:
    zero = fields.packed_zeros(tensor, kind)
    assert zero is not None
    return zero
