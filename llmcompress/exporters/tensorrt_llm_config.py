"""What TensorRT-LLM reads beside tensors: `hf_quant_config.json` and `quantization_config`, as ModelOpt has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from llmcompress.formats.tensorrt_llm import Algorithm


@dataclass(frozen=True)
class Layer:
    """How one linear is quantized."""

    algorithm: Algorithm
    group: int | None
    """Inputs that share a scale; None: the row or the whole matrix does."""

    @property
    def settings(self) -> dict[str, Any]:
        """Its entry in `quantized_layers`, and of a model with one kind of layer the beginning of the file."""
        grouped = {} if self.group is None else {"group_size": self.group}
        scaled = {"has_zero_point": False, "pre_quant_scale": True} if self.algorithm == "W4A16_AWQ" else {}
        return {"quant_algo": self.algorithm, **grouped, **scaled}


Layers = Mapping[str, Layer]
"""By the full name of the linear."""

_NUMBERS: Mapping[Algorithm, tuple[str, int, int | None]] = {
    "W4A16_AWQ": ("int", 4, None),
    "W8A16": ("int", 8, None),
    "W8A8_SQ_PER_CHANNEL": ("int", 8, 8),
    "FP8": ("float", 8, 8),
    "FP8_PER_CHANNEL_PER_TOKEN": ("float", 8, 8),
    "NVFP4": ("float", 4, 4),
    "W4A16_NVFP4": ("float", 4, None),
}
"""Kind of number, bits of weights, bits of activations."""
_PER_CHANNEL: tuple[Algorithm, ...] = ("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL")
_WITH_GROUPS: tuple[Algorithm, ...] = ("FP8", "NVFP4", "W4A16_NVFP4")
"""Of a model of one kind, ModelOpt describes only these in `config_groups` too."""


def quant_file(layers: Layers, linears: Iterable[str], fp8_cache: bool) -> dict[str, Any]:
    """`hf_quant_config.json`, which TensorRT-LLM believes before config.json."""
    cache = {"kv_cache_quant_algo": "FP8" if fp8_cache else None}
    kinds = set(layers.values())
    if len(kinds) > 1:
        each = {name: layer.settings for name, layer in layers.items()}
        quantization: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", **cache, "quantized_layers": each}
    else:
        settings = next(iter(kinds)).settings if kinds else {"quant_algo": None}
        quantization = {**settings, **cache, "exclude_modules": _excluded(layers, linears)}
    return {"producer": _producer(), "quantization": quantization}


def inline_config(layers: Layers, linears: Iterable[str], fp8_cache: bool) -> dict[str, Any]:
    """`quantization_config` of config.json: the same, flat, which other readers of ModelOpt's folders prefer."""
    kinds = list(dict.fromkeys(layers.values()))
    mixed = len(kinds) > 1
    found: dict[str, Any] = {"quant_method": "modelopt", "producer": _producer()}
    if mixed:
        groups = [
            {**_group(kind), "targets": sorted(name for name, layer in layers.items() if layer == kind)}
            for kind in kinds
        ]
        found["config_groups"] = {f"group_{place}": group for place, group in enumerate(groups)}
        found["quantized_layers"] = {name: layer.settings for name, layer in layers.items()}
        found |= {"quant_algo": "MIXED_PRECISION", "ignore": []}
    else:
        if kinds:
            found |= kinds[0].settings
            if kinds[0].algorithm in _WITH_GROUPS:
                found["config_groups"] = {"group_0": {**_group(kinds[0]), "targets": ["Linear"]}}
        found["ignore"] = _excluded(layers, linears)
    if fp8_cache:
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return found


def gptq_config(layers: Layers, linears: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a GPTQ folder; there is no second file."""
    (layer,) = set(layers.values())
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": layer.group,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        "modules_to_not_convert": _excluded(layers, linears),
        "meta": {"quantizer": [f"llmcompress:{version('llmcompress')}"]},
    }


def _group(layer: Layer) -> dict[str, Any]:
    kind, weights, inputs = _NUMBERS[layer.algorithm]
    grouped = {} if layer.group is None else {"group_size": layer.group}
    per_channel = {"strategy": "channel"} if layer.algorithm in _PER_CHANNEL else {}
    found = {"weights": {"dynamic": False, "num_bits": weights, "type": kind, **grouped, **per_channel}}
    if inputs is not None:
        found["input_activations"] = {"dynamic": False, "num_bits": inputs, "type": kind, **grouped}
    return found


def _excluded(layers: Layers, linears: Iterable[str]) -> list[str]:
    return sorted({name for name in linears if name not in layers} | {"model.embed_tokens"})


def _producer() -> dict[str, str]:
    return {"name": "llmcompress", "version": version("llmcompress")}
