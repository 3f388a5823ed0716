"""TensorRT-LLM: the unified Hugging Face checkpoint that `trtllm-serve` and its LLM API read, as ModelOpt writes it.

No engine is built, and nothing is run here: that needs an NVIDIA GPU. What the files hold was compared with ModelOpt,
how they are read with TensorRT-LLM's source (docs/decisions/0040).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Answer, Exact, Exporter, Refused, Saved, Writing
from llmcompress.exporters.checkpoint import write_model
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.folder_read_back import read_folder_back
from llmcompress.exporters.tensorrt_llm_cache import FP8_CACHE, cache_scales, fp8_caches, stock_attentions
from llmcompress.exporters.tensorrt_llm_config import Layer, gptq_config, inline_config, quant_file
from llmcompress.exporters.tensorrt_llm_merged import (
    is_alone,
    is_merged_in_files,
    merged_problems,
    rounded_again,
    shared_scales,
)
from llmcompress.formats import tensorrt_llm
from llmcompress.formats.named import Kind
from llmcompress.formats.tensorrt_llm import Algorithm, algorithm_of
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.kv_cache import coded_attentions
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.quant_linear import QuantLinear, quantized_linears
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.records.export_report import ReadBack

QUANT_FILE = "hf_quant_config.json"

_FAMILIES = ("gemma", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Compared with ModelOpt, tensor by tensor."""
_NO_CLASS = ("gemma",)
_DOUBTS: Mapping[Algorithm, str] = {
    "W4A16_GPTQ": "only recent versions of TensorRT-LLM read GPTQ folders; they add zero points as products in the "
    "model's dtype, which in bfloat16 moves a weight by up to 1/64 of a step",
    "W8A8_SQ_PER_CHANNEL": "ModelOpt writes it so, but the PyTorch backend of TensorRT-LLM has no kernel for it",
    "W4A16_NVFP4": "only recent versions of TensorRT-LLM read weight-only NVFP4",
}
_PHI3 = "TensorRT-LLM's loader of Phi-3 splits packed rows and scales of one axis in the wrong places"
_SPLIT_WRONG: tuple[Algorithm, ...] = ("W4A16_AWQ", "W4A16_GPTQ", "W8A16", "FP8_PER_CHANNEL_PER_TOKEN")


@EXPORTERS.register("tensorrt_llm")
class TensorRtLlmExporter(Exporter):
    """4-bit integers in groups of 64 or 128, 8-bit integers, FP8, NVFP4, and an FP8 KV cache."""

    limits: ClassVar[TargetLimits] = TargetLimits(
        positive_scales=True, ragged_groups=False, scale_dtypes=frozenset({torch.bfloat16, torch.float16})
    )
    cannot_run: ClassVar[str] = "it needs TensorRT-LLM on an NVIDIA GPU"
    fix: ClassVar[str] = "exclude these sites with `exclude`"
    language: ClassVar[str] = "sh"
    how_to_run: ClassVar[str] = """pip install tensorrt-llm        # Linux with an NVIDIA GPU; no engine has to be built
trtllm-serve .                  # an OpenAI-compatible server
python -c "from tensorrt_llm import LLM; print(LLM('.').generate('The').outputs[0].text)\""""

    @override
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """By its grid and its sizes."""
        why = self._problem(site, storage_dtype)
        if why is not None:
            return Refused(why, nearest(site))
        algorithm = algorithm_of(site.scheme, site.outputs, site.inputs)
        assert algorithm is not None
        return Exact(_DOUBTS.get(algorithm))

    @override
    def answers(self, contents: Contents) -> dict[str, Answer]:
        """TensorRT-LLM merges q, k, v and gate, up: they need one scheme, and NVFP4 one second scale."""
        found = super().answers(contents)
        layers = _layers(contents)
        problems = merged_problems(contents, layers)
        again = rounded_again(contents, layers)
        for site in contents.sites:
            if isinstance(found[site.name], Refused):
                continue
            algorithm = layers[site.name].algorithm
            if site.name in problems:
                found[site.name] = Refused(problems[site.name])
            elif site.name in again:
                found[site.name] = Exact(again[site.name])
            elif is_merged_in_files(site.name) and algorithm in _SPLIT_WRONG:
                found[site.name] = Exact(_PHI3)
        return found

    @override
    def problem(self, contents: Contents) -> str | None:
        """It has the family, of stock sizes, and only quantized linears and an FP8 KV cache."""
        family = contents.config.get("model_type")
        if family not in _FAMILIES:
            return (
                f"only {', '.join(_FAMILIES)} were compared with what ModelOpt writes, and `{family}` is none of them"
            )
        if contents.storage_dtype is torch.float32:
            return "TensorRT-LLM computes in bfloat16 or float16; set `save.dtype` to one of them and compress again"
        if others := replace(contents, named_caches=fp8_caches(contents)).more_than_quantized:
            return f"it can represent quantized linears and an FP8 KV cache with one scale per tensor, not {others[0]}"
        kinds = {(layer.algorithm, layer.group) for layer in _layers(contents).values()}
        if any(algorithm == "W4A16_GPTQ" for algorithm, _ in kinds) and (len(kinds) > 1 or fp8_caches(contents)):
            return "codes with zero points (GPTQ) need one group size for the whole model, and nothing else beside them"
        return None

    @override
    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """What TensorRT-LLM makes of it."""
        doubts: dict[str, list[str]] = {}
        for name, answer in answers.items():
            if isinstance(answer, Exact) and answer.doubt:
                doubts.setdefault(answer.doubt, []).append(name)
        found = [f"{why} ({len(names)} linears: {names[0]} …)" for why, names in doubts.items()]
        if fp8_caches(contents):
            found.append(FP8_CACHE)
        if contents.config.get("model_type") in _NO_CLASS:
            found.append(
                "TensorRT-LLM's PyTorch backend has no class for this family; `--backend _autodeploy` may run it"
            )
        return [*found, *dict.fromkeys(note for site in contents.sites if (note := _wider(site)))]

    @override
    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """Codes, scales and bias."""
        algorithm, shape = algorithm_of(site.scheme, site.outputs, site.inputs), (site.outputs, site.inputs)
        if algorithm is None:
            return super().tensors(site, storage_dtype)
        alone = is_alone(site.name)
        return tensorrt_llm.tensors(shape, site.scheme, algorithm, storage_dtype, bias=site.has_bias, alone=alone)

    @override
    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Through the readers of checkpoints."""
        with cache_scales(model):
            return read_folder_back(model, folder, writing.storage_dtype)

    @override
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """A Hugging Face folder with `hf_quant_config.json`."""
        dtype, cache = writing.storage_dtype, bool(coded_attentions(model))
        config = portable_config(model, dtype)
        with stock_attentions(model):
            contents = contents_in(model, dtype)
        layers = _layers(contents)
        shared = shared_scales(contents, layers)
        gptq = any(layer.algorithm == "W4A16_GPTQ" for layer in layers.values())
        with cache_scales(model):
            replaced: dict[str, Callable[[], dict[str, Tensor]]] = {
                name: partial(_tensors, module, layers[name].algorithm, dtype, is_alone(name), shared.get(name))
                for name, module in quantized_linears(model).items()
            }
            if layers or cache:
                config["quantization_config"] = (
                    gptq_config(layers, contents.linears) if gptq else inline_config(layers, contents.linears, cache)
                )
            files, size = write_model(model, folder, config, replaced, writing)
        if (layers or cache) and not gptq and writing.sizes is None:
            text = json.dumps(quant_file(layers, contents.linears, cache), indent=4)
            (folder / QUANT_FILE).write_text(text + "\n", encoding="utf-8")
        return Saved(files, size, "tensorrt_llm")

    def _problem(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> str | None:
        scheme = site.scheme
        if (why := self.limits.problem(scheme, site.inputs, storage_dtype)) is not None:
            return why
        if algorithm_of(scheme, site.outputs, site.inputs) is not None:
            return None
        if scheme.weights.number is None and scheme.weights.bits <= 4 and scheme.activations is None:
            sizes = " or ".join(map(str, tensorrt_llm.GROUPS))
            return f"its 4-bit kernels take groups of {sizes} that divide the inputs, and outputs in multiples of 8"
        return f"TensorRT-LLM has no kernel for {scheme.name}"


def nearest(site: CodedLinear) -> Scheme | None:
    """The scheme most like it that TensorRT-LLM computes with; None where the sizes allow none."""
    grid, activations = site.scheme.weights, site.scheme.activations
    if grid.number is not None:
        eight = ["fp8_tensor_a8tensor"] if grid.scales.single else ["fp8_channel_a8token"]
        names = [*(eight if grid.bits == 8 else ["nvfp4_a" if activations else "nvfp4"]), "fp8_channel_a8token"]
    elif grid.bits > 4 or activations:
        names = ["int8_channel_a8tensor" if activations else "int8_channel"]
    else:
        wanted = grid.length(site.inputs)
        sign = "_positive" if grid.symmetric else "_asym"
        groups = sorted(tensorrt_llm.GROUPS, key=lambda group: abs(group - wanted))
        names = [*(f"int{grid.bits}_g{group}{sign}" for group in groups), "int8_channel"]
    tried = map(named_scheme, names)
    return next((each for each in tried if algorithm_of(each, site.outputs, site.inputs) is not None), None)


def _layers(contents: Contents) -> dict[str, Layer]:
    """What every linear is called that it can hold; beside codes with zero points, all 4-bit codes are GPTQ."""
    found: dict[str, Layer] = {}
    for site in contents.sites:
        algorithm = algorithm_of(site.scheme, site.outputs, site.inputs)
        if algorithm is not None:
            grid = site.scheme.weights
            found[site.name] = Layer(
                algorithm, None if grid.group is None and grid.bits == 8 else grid.length(site.inputs)
            )
    if any(layer.algorithm == "W4A16_GPTQ" for layer in found.values()):
        gptq: Algorithm = "W4A16_GPTQ"
        return {
            name: Layer(gptq, layer.group) if layer.algorithm == "W4A16_AWQ" else layer for name, layer in found.items()
        }
    return found


def _tensors(
    module: QuantLinear, algorithm: Algorithm, dtype: torch.dtype, alone: bool, shared: Tensor | None
) -> dict[str, Tensor]:
    codes = module.leaf()
    if shared is not None:
        tensor = tensorrt_llm.with_shared_scale(codes.tensor, shared)
        assert tensor is not None  # it was refused otherwise
        codes = Quantized(tensor, codes.activations, codes.input_scale, bias=codes.bias)
    cache = {name: each for name in ("k_scale", "v_scale") if (each := module._buffers.get(name)) is not None}
    return {**tensorrt_llm.pack(codes, algorithm, dtype, alone=alone), **cache}


def _wider(site: CodedLinear) -> str | None:
    grid = site.scheme.weights
    if grid.number is None and grid.bits < 4:
        return f"{site.scheme.name}: codes are stored in fields of 4 bits"
    return None
