"""What all targets with Optimum's ONNX graph share: which models it is made for, how it is written and read back."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import Exporter, Saved, Writing
from llmcompress.exporters.cache_widths import cache_problem
from llmcompress.exporters.contents import Contents, contents_in
from llmcompress.exporters.onnx_file import DATA, FILE, fill, read_back, tensors_of, write
from llmcompress.exporters.onnx_graph import Plan, graph_with_holes, plan_of
from llmcompress.exporters.onnx_nodes import Nodes
from llmcompress.modules.expression import Expression, InputTransform, Opaque
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.records.export_report import ReadBack

MODEL_TYPES = frozenset(
    {
        *("arcee", "bloom", "codegen", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_neo"),
        *("gpt_neox", "gptj", "granite", "helium", "llama", "mistral", "mpt", "nemotron", "olmo", "olmo2", "opt"),
        *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"),
    }
)
"""Causal models that optimum-onnx 0.1 exports with a KV cache and whose matrices are ordinary linears."""


class OnnxGraphExporter(Exporter):
    """A graph with a hole for every matrix, which `_nodes` fills."""

    runtime: ClassVar[str] = "onnxruntime"
    caches: ClassVar[bool] = True
    """Whether the graph has a KV cache."""

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
        uneven = cache_problem(contents) if self.caches else None
        if uneven is not None:
            return uneven
        found = ((name, problem_of(module.expression())) for name, module in contents.modules.items())
        return next((f"{name} {why}" for name, why in found if why is not None), None)

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

    @abstractmethod
    def _nodes(self, plan: Plan, writing: Writing) -> Nodes:
        """What fills the holes."""


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
