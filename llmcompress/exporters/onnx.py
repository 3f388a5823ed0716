"""ONNX: one graph with KV cache for ONNX Runtime, loaded by `ORTModelForCausalLM`; codes in MatMulNBits.

Codes and scales are carried, never rounded again (docs/decisions/0037).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact, Exporter, Refused, Saved, Writing
from llmcompress.exporters.cache_widths import cache_problem
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.onnx_file import DATA, FILE, fill, read_back, tensors_of, write
from llmcompress.exporters.onnx_graph import Plan, graph_with_holes, plan_of
from llmcompress.exporters.onnx_nodes import Nodes
from llmcompress.formats import onnx as fields
from llmcompress.formats import plain
from llmcompress.formats.named import Kind
from llmcompress.modules.expression import Expression, InputTransform, Opaque
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.limits import TargetLimits
from llmcompress.records.export_report import ReadBack

MODEL_TYPES = frozenset(
    {
        *("arcee", "bloom", "codegen", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_neo"),
        *("gpt_neox", "gptj", "granite", "helium", "llama", "mistral", "mpt", "nemotron", "olmo", "olmo2", "opt"),
        *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"),
    }
)
"""Causal models that optimum-onnx 0.1 exports with a KV cache and whose matrices are ordinary linears."""
_INT8 = 4
"""The accuracy level at which MatMulNBits multiplies integers."""
_PER_BLOCK = "activations are rounded to 8 bits per block of a row, which is finer"
_NOT_ROUNDED = "with accuracy_level {level} activations are not rounded"


@EXPORTERS.register("onnx")
class OnnxExporter(Exporter):
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
    """How MatMulNBits computes: 4 rounds activations to 8 bits, which is fast; 0 keeps float32, which is exact and slow
    with 8-bit weights."""
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
        level = self.accuracy_level
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
    def problem(self, contents: Contents) -> str | None:
        """Optimum has a graph for the family, and every module is made of matrices."""
        kind = contents.config.get("model_type")
        if kind is not None and kind not in MODEL_TYPES:
            known = ", ".join(sorted(MODEL_TYPES))
            return f"Optimum's exporter has no graph for `{kind}` with ordinary linears; it has: {known}"
        if contents.banks:
            return f"{contents.banks[0]} is one of the experts of a bank, which has no graph here"
        private = [
            name for name, values in contents.differences.attributes.items() if any("config." in key for key in values)
        ]
        wrapped = [name for name, module in contents.modules.items() if module.wraps_original]
        for name in (*wrapped, *private):
            return f"{name} is not what the config says, and Optimum builds the graph from the config"
        caches = cache_problem(contents)
        if caches is not None:
            return caches
        found = ((name, problem_of(module.expression())) for name, module in contents.modules.items())
        return next((f"{name} {why}" for name, why in found if why is not None), None)

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """What is not carried as it is, wider fields, and how the runtime computes."""
        changed = [f"{name}: {answer.why}" for name, answer in answers.items() if isinstance(answer, Converted)]
        wider = [note for site in contents.sites if (note := _wider(site)) is not None]
        how = "the runtime rounds activations to 8 bits" if self.accuracy_level == _INT8 else "activations stay float32"
        level = [f"accuracy_level {self.accuracy_level}: {how}"] if contents.sites else []
        return [*changed, *dict.fromkeys(wider), *level]

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
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """`model.onnx`, its tensors in `model.onnx_data`, and the config."""
        plan = self._plan(model, writing)
        proto, nodes = graph_with_holes(plan, writing.progress), self._nodes(plan, writing)
        fill(proto, plan, nodes)
        size = write(proto, tensors_of(plan, nodes, model), folder, model, writing.weights_at)
        (folder / "config.json").write_text(json.dumps(dict(plan.config), indent=2, sort_keys=True) + "\n")
        return Saved((FILE, DATA), size, "onnx")

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """From the places that the graph names, by our layouts."""
        plan = self._plan(model, writing)
        return read_back(folder, tensors_of(plan, self._nodes(plan, writing), model))

    def _plan(self, model: PreTrainedModel, writing: Writing) -> Plan:
        return plan_of(model, contents_in(model, writing.storage_dtype), writing.storage_dtype)

    def _nodes(self, plan: Plan, writing: Writing) -> Nodes:
        return Nodes(writing.storage_dtype, self.accuracy_level, tied=plan.tied)


def problem_of(form: Expression) -> str | None:
    """Why no nodes compute an expression; None: they do."""
    for node in form.nodes():
        if isinstance(node, Opaque):
            return f"has no expression: {node.reason}"
        if isinstance(node, InputTransform) and not node.change.is_linear:
            return f"changes its inputs by {type(node.change).__name__} (dynamic inference)"
        if isinstance(node, Quantized) and node.activations == "group":
            return f"rounds activations as {node.scheme.name} does"
    return None


def _wider(site: CodedLinear) -> str | None:
    """What a user would be surprised by."""
    grid = site.scheme.weights
    kind = fields.layout(grid, site.inputs)
    if kind is None or fields.multiplies_integers(site.scheme, site.inputs) or (kind.bits == grid.bits):
        return None
    return f"{site.scheme.name}: codes of {grid.bits} bits are stored in {kind.bits}"
