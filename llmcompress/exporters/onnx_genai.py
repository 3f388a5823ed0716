"""onnxruntime-genai: a folder with its graph, our codes in it, and what its tokenizer and generation loop read.

The graph is that of its own builder, with attention and cache in operators made for decoding; matrices are put in by us
(docs/decisions/0039).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.exporters.base import EXPORTERS, Saved, Writing
from llmcompress.exporters.cache_widths import cache_problem
from llmcompress.exporters.contents import Contents, contents_in
from llmcompress.exporters.gguf_architectures import head_size
from llmcompress.exporters.onnx import OnnxExporter
from llmcompress.exporters.onnx_base import problem_of
from llmcompress.exporters.onnx_file import DATA, FILE, fill, read_back, tensors_of, write
from llmcompress.exporters.onnx_genai_builder import CONFIG, Skeleton, build, embedding_in, matrices_in
from llmcompress.exporters.onnx_genai_matrices import Matrices
from llmcompress.exporters.onnx_graph import Plan, plan_of
from llmcompress.exporters.onnx_graph_program import DOMAIN
from llmcompress.exporters.onnx_package import onnx_package
from llmcompress.modules.expression import Expression, Gather, Tied
from llmcompress.modules.expression_leaves import Dense
from llmcompress.records.export_report import ReadBack

ROPES: Mapping[str, frozenset[str]] = {
    "gemma": frozenset({"default"}),
    "gemma2": frozenset({"default"}),
    "llama": frozenset({"default", "llama3"}),
    "mistral": frozenset({"default"}),
    "phi3": frozenset({"default"}),
    "qwen2": frozenset({"default"}),
    "qwen3": frozenset({"default"}),
}
"""Families whose graph was compared with PyTorch, and the kinds of rotary embedding that it computes."""
_HEAD_MULTIPLE = 16
"""Of GroupQueryAttention in ONNX Runtime on CPUs."""
_CACHE_AXES = 4
_LISTED = "llmcompress.matrices"
"""Key in the graph's metadata: the names of its matrices."""


@EXPORTERS.register("onnx_genai")
class OnnxGenaiExporter(OnnxExporter):
    """What `onnx` holds, for families that the builder of onnxruntime-genai knows."""

    runtime: ClassVar[str] = "onnxruntime_genai"
    how_to_run: ClassVar[str] = """import onnxruntime_genai as og      # pip install onnxruntime-genai
model = og.Model("."); tokenizer = og.Tokenizer(model); params = og.GeneratorParams(model)
params.set_search_options(max_length=64); generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("The"))
while not generator.is_done(): generator.generate_next_token(); print(tokenizer.decode(generator.get_next_tokens()))"""

    @override
    def problem(self, contents: Contents) -> str | None:
        """The builder has a graph for the family, of stock sizes, and every module is made of matrices."""
        why = config_problem(contents.config) if contents.config else None
        if why is not None:
            return why
        if contents.rearranged:
            return f"the builder of onnxruntime-genai has no graph for {', '.join(contents.rearranged[:3])}"
        caches = cache_problem(contents)
        if caches is not None:
            return caches
        found = ((name, problem_of(module.expression())) for name, module in contents.modules.items())
        return next((f"{name} {reason}" for name, reason in found if reason is not None), None)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """`model.onnx`, its tensors beside it, and `genai_config.json`."""
        plan = self._plan(model, writing)
        skeleton = _skeleton(model, plan, writing)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="llmcompress-genai-", dir=folder.parent) as scratch:
            proto, holes = _with_holes(plan, skeleton, Path(scratch), writing)
            shutil.copyfile(Path(scratch) / "built" / CONFIG, folder / CONFIG)
        plan = replace(plan, holes=holes, parameters={})
        entry = proto.metadata_props.add()
        entry.key, entry.value = _LISTED, json.dumps(list(holes))
        fill(proto, plan, self._nodes(plan, writing))
        nodes = tensors_of(plan, self._nodes(plan, writing), model)
        size = write(proto, nodes, folder, model, writing.weights_at)
        (folder / "config.json").write_text(json.dumps(dict(plan.config), indent=2, sort_keys=True) + "\n")
        return Saved((FILE, DATA), size, "onnx_genai")

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """From the places that the graph names; norms are looked for by their numbers."""
        plan, proto = self._plan(model, writing), onnx_package().load(str(folder / FILE), load_external_data=False)
        matrices = Matrices(plan.holes)
        names = json.loads(next(each.value for each in proto.metadata_props if each.key == _LISTED))
        assert matrices.linears_in(names) == set(plan.holes), "the graph does not have every matrix"
        holes = {name: form for name in names if (form := matrices.form_called(name)) is not None}
        nodes = tensors_of(replace(plan, holes=holes, parameters={}), self._nodes(plan, writing), model)
        return [*read_back(folder, nodes), *_parameters(proto, plan, model, writing.storage_dtype)]

    @override
    def _plan(self, model: PreTrainedModel, writing: Writing) -> Plan:
        """Without the embedding's multiplier, which stands in the builder's graph."""
        plan = plan_of(model, contents_in(model, writing.storage_dtype), writing.storage_dtype)
        name, table = next(each for each in model.named_modules() if each[1] is model.get_input_embeddings())
        holes = dict(plan.holes)
        if name not in holes:  # a class of its own, which multiplies what it looks up
            assert isinstance(table.weight, nn.Parameter)
            holes[name] = Gather(Dense(table.weight))
            for head, form in plan.holes.items():
                if isinstance(form, Dense) and form.weight is table.weight:
                    holes[head] = Tied(name, form)
        lookup = holes[name]
        assert isinstance(lookup, Gather)
        holes[name] = replace(lookup, multiplier=1.0)
        parameters = {each: shape for each, shape in plan.parameters.items() if each != f"{name}.weight"}
        return replace(plan, holes=holes, parameters=parameters)


def config_problem(config: Mapping[str, Any]) -> str | None:
    """Why the builder's graph is none of this config; None: it is."""
    kind = str(config.get("model_type"))
    if kind not in ROPES:
        return f"the builder of onnxruntime-genai is used for {', '.join(sorted(ROPES))}; `{kind}` is none of them"
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = str(scaling.get("rope_type", scaling.get("type", "default")))
    if rope not in ROPES[kind]:
        return f"rotary embeddings of the kind `{rope}` were not checked in the builder's graph of `{kind}`"
    if head_size(config) % _HEAD_MULTIPLE:
        return f"its attention takes heads of a multiple of {_HEAD_MULTIPLE}, and these have {head_size(config)}"
    original = config.get("original_max_position_embeddings")
    if kind == "phi3" and original != config.get("max_position_embeddings"):
        return "the builder takes this config of `phi3` for one with LongRoPE"
    return None


def _skeleton(model: PreTrainedModel, plan: Plan, writing: Writing) -> Skeleton:
    embedding = next(name for name, form in plan.holes.items() if isinstance(form, Gather))
    return Skeleton(
        config=plan.config,
        outputs={name: form.shape[0] for name, form in plan.holes.items() if name != embedding},
        embedding=embedding,
        width=plan.holes[embedding].shape[1],
        others={name: model.get_parameter(name).detach().to(writing.storage_dtype) for name in plan.parameters},
        tokenizer=writing.tokenizer,
        generation_config=model.generation_config,
    )


def _with_holes(plan: Plan, skeleton: Skeleton, scratch: Path, writing: Writing) -> tuple[Any, dict[str, Expression]]:
    """The builder's graph with a hole for every matrix; q, k and v are one where their codes can be one matrix."""
    matrices = Matrices(plan.holes)
    for fused in (True, False):
        shutil.rmtree(scratch / "skeleton", ignore_errors=True)
        proto = build(skeleton, scratch, fused=fused, progress=writing.progress)
        found = {matrices.name_of(rows): node for node, rows in matrices_in(proto, skeleton)}
        forms = {name: matrices.form_called(name) for name in found}
        holes = {name: form for name, form in forms.items() if form is not None}
        if len(holes) == len(found):
            break
    else:
        missing = next(name for name, form in forms.items() if form is None)
        raise CompressError(
            "export.graph",
            "the graph of onnxruntime-genai computes parts of a module that cannot be taken apart",
            where=missing,
            fix="quantize this module without a transform around it, or export to `onnx`",
        )
    placeholders = {name for node in found.values() for name in node.input[1:]}
    for name, node in found.items():
        _make_hole(node, name, node.input[0])
    lookup = embedding_in(proto)
    placeholders.add(lookup.input[0])
    _make_hole(lookup, skeleton.embedding, lookup.input[1])
    for each in (*proto.graph.input, *proto.graph.output):
        dims = each.type.tensor_type.shape.dim
        if len(dims) == _CACHE_AXES:
            dims[-1].dim_value = head_size(plan.config)
    kept = [each for each in proto.graph.initializer if each.name not in placeholders]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto, {skeleton.embedding: plan.holes[skeleton.embedding], **holes}


def _make_hole(node: Any, name: str, x: str) -> None:
    output = node.output[0]
    node.CopyFrom(onnx_package().helper.make_node("Hole", [x], [output], node.name, domain=DOMAIN, module=name))


def _parameters(proto: Any, plan: Plan, model: PreTrainedModel, dtype: torch.dtype) -> list[ReadBack]:
    """A row for every parameter that is no matrix: the graph must hold its numbers, or 1 + them, as Gemma's norms."""
    to_array = onnx_package().numpy_helper.to_array
    inside = [torch.from_numpy(to_array(each).copy()) for each in proto.graph.initializer if each.raw_data]
    rows = []
    for name in plan.parameters:
        wanted = model.get_parameter(name).detach().to(dtype).float()
        same = any(_holds(found, wanted) for found in inside)
        rows.append(
            ReadBack(
                source=name,
                stored_as="float",
                values=wanted.numel(),
                weights_differing=0 if same else wanted.numel(),
            )
        )
    return rows


def _holds(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and (torch.equal(found, wanted) or torch.equal(found, wanted + 1))
