"""OpenVINO: a folder that `OVModelForCausalLM` and `openvino_genai.LLMPipeline` open.

The graph comes from Optimum, with placeholders; matrices are put into it here, codes and scales as compressed constants
with their decompression (docs/decisions/0038).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact, Exporter, Refused, Saved, Writing
from llmcompress.exporters.cache_widths import cache_problem
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.openvino_form import why_not
from llmcompress.exporters.openvino_read_back import read_back
from llmcompress.exporters.openvino_request import GRAPH, TOKENIZER, build_graph, request_of
from llmcompress.exporters.openvino_surgery import keep_activations, read_graph, replace_placeholders, write_graph
from llmcompress.formats import openvino, plain
from llmcompress.formats.named import Kind
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import Scheme
from llmcompress.records.export_report import ReadBack

_PER_TOKEN = (
    "activations are rounded by the runtime, in groups of inputs instead of per token, where its dynamic quantization "
    "is on (the option `dynamic_quantization`)"
)
_EXPANDED = (
    "OpenVINO on a CPU expands fp8 to bfloat16 or float32 in memory: the files are small, decoding is not faster"
)


@EXPORTERS.register("openvino")
class OpenVinoExporter(Exporter):
    """Integers of 2 to 8 bits with any equal groups, nf4, fp4, mxfp4 and nvfp4 stay compressed in memory; fp8 in the
    file. Low-rank factors are two products, pruned shapes are as they are, activations are rounded as calibrated.
    """

    limits: ClassVar[TargetLimits] = TargetLimits(ragged_groups=False, rounded_embedding=True)
    runtime: ClassVar[str] = "openvino"
    fix: ClassVar[str] = "set the option `instead: dense` to store such linears as ordinary weights"
    how_to_run: ClassVar[str] = """import openvino_genai                            # pip install openvino-genai
print(openvino_genai.LLMPipeline(".", "CPU").generate("The", max_new_tokens=20))
from optimum.intel import OVModelForCausalLM     # or: pip install "llmcompress[openvino-export]"
model = OVModelForCausalLM.from_pretrained(".")
# or: llmcompress evaluate . --runner openvino"""

    instead: Literal["refuse", "dense"] = "refuse"
    """What happens to a linear that the graph cannot hold as it is. `dense`: it becomes ordinary weights."""
    dynamic_quantization: bool | None = None
    """Whether the runtime rounds activations to 8 bits before compressed matrices, as it does by itself: that is
    faster, and moves perplexity by some tenths of a percent (docs/log.md). None: only where a scheme rounds them per
    token."""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """By its grid, its groups and how its inputs are rounded."""
        scheme = site.scheme
        why = self._problem(scheme, site.inputs)
        if why is not None:
            refused = Refused(why, self._nearest(scheme, site.inputs))
            return refused if self.instead == "refuse" or scheme.activations else Converted(f"{why}; it becomes dense")
        if scheme.activations == "token":
            return Converted(_PER_TOKEN, keeps_codes=True)
        if openvino.element_type(scheme.weights).name in openvino.EXPANDED:
            return Converted(_EXPANDED, keeps_codes=True)
        return Exact()

    @override
    def problem(self, contents: Contents) -> str | None:
        """Matrices of codes and ordinary weights, their products and sums, in the places of the stock model's."""
        for name, module in contents.modules.items():
            form = module.expression()
            why = why_not(form)
            if why is not None and (self.instead == "refuse" or not form.is_linear):
                return f"{name} {why}"
        return cache_problem(contents)

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """Once each, what is not carried as it is."""
        changed = dict.fromkeys(each.why for each in answers.values() if isinstance(each, Converted))
        wide = sorted(
            {
                f"{site.scheme.name}: codes are stored as {kind.name}"
                for site in contents.sites
                if not isinstance(answers[site.name], Refused)
                and (kind := openvino.element_type(site.scheme.weights)).bits != site.scheme.weights.bits
            }
        )
        rounds = self._rounds_activations(contents)
        how = "the runtime rounds activations to 8 bits (dynamic quantization)"
        return [*changed, *wide, how if rounds else "the file turns dynamic quantization of activations off"]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Its constants, or an ordinary weight."""
        shape = (site.outputs, site.inputs)
        if not openvino.fits(site.scheme.weights, site.inputs):
            return plain.tensors(shape, storage_dtype, bias=site.has_bias)
        return openvino.tensors(shape, site.scheme, storage_dtype, bias=site.has_bias)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """The graph and its weights, the tokenizer as models of OpenVINO, and the config."""
        folder.mkdir(parents=True, exist_ok=True)
        scratch, file = folder / "scratch", folder / f"{GRAPH}.xml"
        request = request_of(model, writing.storage_dtype, as_dense=self.instead == "dense")
        try:
            made = build_graph(model, request, scratch, writing)
            graph = read_graph(made)
            kept = replace_placeholders(graph, request, writing.storage_dtype, weights_at=writing.weights_at)
            if not self._rounds_activations(contents_in(model, writing.storage_dtype)):
                keep_activations(graph)
            write_graph(graph, file)
            del graph, kept  # in this order: the constants share the memory of what is kept
            for name in TOKENIZER:
                for part in made.parent.glob(f"{name}.*"):
                    part.rename(folder / part.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        config = portable_config(model, writing.storage_dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        files = (file.name, file.with_suffix(".bin").name)
        return Saved(files, (folder / files[1]).stat().st_size, "openvino")

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """From the XML and the bytes beside it, without OpenVINO."""
        request = request_of(model, writing.storage_dtype, as_dense=self.instead == "dense")
        return read_back(folder / f"{GRAPH}.xml", request, writing.storage_dtype)

    def _rounds_activations(self, contents: Contents) -> bool:
        if self.dynamic_quantization is not None:
            return self.dynamic_quantization
        return any(site.scheme.activations == "token" for site in contents.sites)

    def _problem(self, scheme: Scheme, inputs: int) -> str | None:
        if scheme.activations == "group":
            return "it does not round activations in groups with a scale of their own"
        if scheme.activations and scheme.weights.number is not None:
            return f"it rounds activations to int8 alone, and {scheme.name} to another format"
        return self.limits.problem(scheme, inputs)

    def _nearest(self, scheme: Scheme, inputs: int) -> Scheme | None:
        if scheme.activations and scheme.weights.number is not None:
            scheme = replace(scheme, activations=None)
        return self.limits.nearest(scheme, inputs)
