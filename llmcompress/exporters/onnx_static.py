"""ONNX with fixed sizes and 8-bit integers in QDQ form, as toolchains of accelerators without dynamic shapes take it.

One sequence of a given length, no cache, no free dimension, and the standard's operators alone: int8 weights with one
scale an output, activations through QuantizeLinear and DequantizeLinear with their calibrated scale, zero points 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Exact, Refused, Writing
from llmcompress.exporters.checkpoint import block_of
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.exporters.onnx_base import OnnxGraphExporter
from llmcompress.exporters.onnx_graph import Plan
from llmcompress.exporters.onnx_nodes import HeldCodes, Nodes
from llmcompress.exporters.onnx_package import onnx_package
from llmcompress.formats import onnx as fields
from llmcompress.formats.named import Kind
from llmcompress.formats.onnx import NBits
from llmcompress.modules.expression import Expression
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.quantized import QuantizedTensor

_LINEARS, _TABLE = "int8_channel_a8tensor", "int8_channel"
_NOT_CALIBRATED = "it needs activations that are rounded with a calibrated scale (`_a8tensor`)"


@EXPORTERS.register("onnx_static_int8")
class OnnxStaticExporter(OnnxGraphExporter):
    """Linears of `int8_channel_a8tensor`, an embedding of `int8_channel`; everything in blocks must be quantized."""

    limits: ClassVar[TargetLimits] = TargetLimits(
        integers_only=True, symmetric_only=True, groups=frozenset(), rounded_embedding=True
    )
    caches: ClassVar[bool] = False
    fix: ClassVar[str] = "calibrate a W8A8 scheme, e.g. `smoothquant` and then `rtn` with int8_channel_a8tensor"
    how_to_run: ClassVar[str] = """import numpy, onnxruntime            # pip install onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
shape = session.get_inputs()[0].shape   # one sequence of exactly so many tokens; fill the rest with anything
logits, = session.run(["logits"], {each.name: numpy.ones(shape, "int64") for each in session.get_inputs()})
# or: llmcompress evaluate . --runner onnxruntime"""

    sequence: Annotated[int, Field(ge=2, le=131_072)] = 128
    """Tokens of the one sequence that the graph takes; shorter texts are filled up at the end."""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """Whole rows, symmetric, and calibrated activations."""
        why = self.limits.problem(site.scheme, site.inputs)
        if why is None and site.scheme.activations != "tensor":
            why = _NOT_CALIBRATED
        return Exact() if why is None else Refused(why, named_scheme(_LINEARS))

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """A table of codes has no activations to be rounded."""
        tables = {}
        for site in contents.tables:
            why = self.limits.problem(site.scheme, site.inputs)
            tables[site.name] = Exact() if why is None else Refused(why, named_scheme(_TABLE))
        return {**super().answers(contents), **tables}

    @override
    def problem(self, contents: Contents) -> str | None:
        """As for `onnx`; and no matrix of a block is left in floating point."""
        coded = {site.name for site in contents.sites}
        dense = [name for name in contents.linears if block_of(name) and name not in coded]
        if dense:
            return f"{dense[0]} (of {len(dense)} in blocks) is not quantized, and the profile is of integers alone"
        return super().problem(contents)

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """What the graph is for, and what of it is in floating point."""
        coded = {site.name for site in contents.sites}
        dense = [name for name in contents.linears if name not in coded]
        floats = [f"{', '.join(dense)}: float32"] if dense else []
        return [f"one sequence of {self.sequence} tokens, without a KV cache; no size is free", *floats]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Int8 as it is."""
        return fields.tensors((site.outputs, site.inputs), site.scheme, None, bias=site.has_bias)

    @override
    def _plan(self, model: PreTrainedModel, writing: Writing) -> Plan:
        return replace(super()._plan(model, writing), sequence=self.sequence)

    @override
    def _nodes(self, plan: Plan, writing: Writing) -> Nodes:
        return StaticNodes(writing.storage_dtype, 0, tied=plan.tied)


@dataclass
class StaticNodes(Nodes):
    """Nodes of the standard's operators: integers are dequantized in front of every product, which compilers fuse."""

    @override
    def _int8_products(self, form: Quantized, name: str, x: str) -> str:
        assert form.input_scale is not None
        scale = self._constant(f"{name}.input_scale", name, form.input_scale.detach().float().reshape(()))
        zero = self._constant("llmcompress.int8.0", "", torch.tensor(0, dtype=torch.int8))
        rounded = self._node("QuantizeLinear", [x, scale, zero], name)
        x = self._node("DequantizeLinear", [rounded, scale, zero], name)
        return self._node("MatMul", [x, self._weight(form.tensor, name, name)], name)

    @override
    def _n_bits(self, form: Quantized, kind: NBits, owner: str, name: str, x: str) -> str:
        """A head whose inputs are not rounded."""
        return self._node("MatMul", [x, self._weight(form.tensor, owner, name)], name)

    @override
    def _rows(self, table: Quantized, name: str, ids: str) -> str | None:
        codes, scales = self._codes(table.tensor, name)
        found = self._node("Gather", [codes, ids], name, axis=1)
        floats = self._node("Cast", [found], name, to=onnx_package().TensorProto.FLOAT)
        scaled = self._node("Mul", [floats, self._node("Gather", [scales, ids], name, axis=0)], name)
        return self._node("Transpose", [scaled], name, perm=[1, 2, 0])

    @override
    def _times_rows(self, x: str, table: str, name: str) -> str:
        return self._node("MatMul", [x, self._node("Transpose", [table], name, perm=[1, 0])], name)

    @override
    def _table(self, owner: str, table: Expression) -> str:
        """In float32: accelerators rarely take bfloat16 constants."""
        return self._hold(f"{owner}.weight", owner, table.shape, torch.float32, lambda: self._values(table))

    def _weight(self, tensor: QuantizedTensor, owner: str, name: str) -> str:
        """Inputs × outputs."""
        codes, scales = self._codes(tensor, owner)
        zeros = self._hold(f"{owner}.zeros", "", (tensor.shape[0],), torch.int8, lambda: _no_zeros(tensor))
        return self._node("DequantizeLinear", [codes, scales, zeros], name, axis=1)

    def _codes(self, tensor: QuantizedTensor, owner: str) -> tuple[str, str]:
        """Inputs × outputs int8, also those of a table, and the scale of every output."""
        outputs, inputs = tensor.shape
        self.codes[owner] = HeldCodes(owner, tensor, None)
        codes = self._hold(f"{owner}.codes", owner, (inputs, outputs), torch.int8, lambda: tensor.codes.T)
        scales = self._hold(f"{owner}.scales", owner, (outputs,), torch.float32, lambda: tensor.scale.float()[:, 0])
        return codes, scales


def _no_zeros(tensor: QuantizedTensor) -> torch.Tensor:
    return torch.zeros(tensor.shape[0], dtype=torch.int8)
