"""ONNX: one graph with KV cache for ONNX Runtime, loaded by `ORTModelForCausalLM`; codes in MatMulNBits.

Codes and scales are carried, never rounded again (docs/decisions/0037).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact, Refused, Writing
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.exporters.onnx_base import OnnxGraphExporter
from llmcompress.exporters.onnx_graph import Plan
from llmcompress.exporters.onnx_nodes import Nodes
from llmcompress.formats import onnx as fields
from llmcompress.formats import plain
from llmcompress.formats.named import Kind
from llmcompress.modules.limits import TargetLimits

_INT8 = 4
"""The accuracy level at which MatMulNBits multiplies integers."""
_PER_BLOCK = "activations are rounded to 8 bits per block of a row, which is finer"
_NOT_ROUNDED = "with accuracy_level {level} activations are not rounded"


@EXPORTERS.register("onnx")
class OnnxExporter(OnnxGraphExporter):
    """Integers of 2 to 8 bits and ternary, in groups that are multiples of 16; low-rank factors; ordinary weights."""

    limits: ClassVar[TargetLimits] = TargetLimits(integers_only=True, group_multiple=16, rounded_embedding=True)
    runtime: ClassVar[str] = "onnxruntime"
    fix: ClassVar[str] = "set the option `instead: dense`, which stores such linears as ordinary weights"
    how_to_run: ClassVar[str] = """# pip install "optimum-onnx[onnxruntime]"
from optimum.onnxruntime import ORTModelForCausalLM; from transformers import AutoTokenizer
model, tokenizer = ORTModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))"""

    accuracy_level: Annotated[int, Field(ge=0, le=4)] = 4
    """How MatMulNBits computes: 4 rounds activations to 8 bits, which is fast; 0 keeps float32, which is exact and
    slower (docs/log.md)."""
    accuracy_level_of_8_bits: Annotated[int, Field(ge=0, le=4)] | None = None
    """The same of matrices in 8 bits alone, for which float32 has no fast kernel; None: as of all others."""
    instead: Literal["refuse", "dense"] = "refuse"
    """What happens to a linear whose codes no operator holds. `dense`: it is dequantized to ordinary weights."""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """By its grid: blocks must divide groups."""
        scheme = site.scheme
        if fields.layout(scheme.weights, site.inputs) is None:
            why = self.limits.problem(scheme, site.inputs) or f"MatMulNBits has no form for {scheme.name}"
            if self.instead == "dense" and scheme.activations is None:
                return Converted(f"{why}; it is dequantized to ordinary weights")
            return Refused(why, self.limits.nearest(scheme, site.inputs))
        if scheme.activations is None or fields.multiplies_integers(scheme, site.inputs):
            return Exact()
        level = self._level(site)
        return Converted(_PER_BLOCK if level == _INT8 else _NOT_ROUNDED.format(level=level), keeps_codes=True)

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """Of a table of codes its rows must be looked up too."""
        tables = {site.name: self._check_rows(site, contents.storage_dtype) for site in contents.tables}
        return {**super().answers(contents), **tables}

    def _check_rows(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        answer, grid = self.check(site, storage_dtype), site.scheme.weights
        if isinstance(answer, Refused) or fields.layout(grid, site.inputs, looks_up=True) is not None:
            return answer
        why = f"GatherBlockQuantized takes equal blocks of 16 or more numbers, and rows of {site.inputs} have none"
        if self.instead == "dense":
            return Converted(f"{why}; the embedding is dequantized to ordinary weights")
        return Refused(why)

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """What is not carried as it is, wider fields, and how the runtime computes."""
        changed = [f"{name}: {answer.why}" for name, answer in answers.items() if isinstance(answer, Converted)]
        wider = [note for site in contents.sites if (note := _wider(site)) is not None]
        levels = sorted({self._level(site) for site in contents.sites})
        return [*changed, *dict.fromkeys(wider), *(_computed(level) for level in levels)]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Its fields, or an ordinary weight; everything dense is float32."""
        kind, shape = fields.layout(site.scheme.weights, site.inputs), (site.outputs, site.inputs)
        if kind is None:
            return plain.tensors(shape, torch.float32, bias=site.has_bias, transposed=True)
        if fields.multiplies_integers(site.scheme, site.inputs):
            kind = None
        return fields.tensors(shape, site.scheme, kind, bias=site.has_bias)

    @override
    def _nodes(self, plan: Plan, writing: Writing) -> Nodes:
        level, of_8_bits = self.accuracy_level, self.accuracy_level_of_8_bits
        return Nodes(writing.storage_dtype, level, tied=plan.tied, accuracy_level_of_8_bits=of_8_bits)

    def _level(self, site: CodedLinear) -> int:
        kind, of_8_bits = fields.layout(site.scheme.weights, site.inputs), self.accuracy_level_of_8_bits
        return self.accuracy_level if of_8_bits is None or kind is None or kind.bits < fields.WIDTHS[-1] else of_8_bits


def _computed(level: int) -> str:
    how = "the runtime rounds activations to 8 bits" if level == _INT8 else "activations stay float32"
    return f"accuracy_level {level}: {how}"


def _wider(site: CodedLinear) -> str | None:
    """What a user would be surprised by."""
    grid = site.scheme.weights
    kind = fields.layout(grid, site.inputs)
    if kind is None or fields.multiplies_integers(site.scheme, site.inputs) or (kind.bits == grid.bits):
        return None
    return f"{site.scheme.name}: codes of {grid.bits} bits are stored in {kind.bits}"
