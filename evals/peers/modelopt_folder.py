"""Runs in the environment of NVIDIA ModelOpt: quantizes tiny models and writes the folders that TensorRT-LLM reads.

    python modelopt_folder.py OUT [--family llama …] [--algorithm FP8 …] [--dtype float32]

`OUT/FAMILY-ALGORITHM` is what `export_hf_checkpoint` writes, `OUT/FAMILY-ALGORITHM.weights.safetensors` the weights
that ModelOpt itself computes with (its simulated quantization), by the names of the checkpoint. Prints versions as
JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "phi3": {},
}
ALGORITHMS: dict[str, str] = {
    "W4A16_AWQ": "INT4_AWQ_CFG",
    "FP8": "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "W8A8_SQ_PER_CHANNEL": "INT8_SMOOTHQUANT_CFG",
    "W8A16": "INT8_WEIGHT_ONLY_CFG",
    "NVFP4": "NVFP4_DEFAULT_CFG",
    "W4A16_NVFP4": "W4A16_NVFP4_CFG",
}
FOUR_BIT_FLOATS = (2, 1)
"""What ModelOpt calls E2M1."""
CACHE = "FP8-kv"
MIXED = "MIXED"


def main() -> None:
    """Write every pair that was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--algorithm", nargs="*", default=[*ALGORITHMS, CACHE, MIXED])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    for family in chosen.family:
        for algorithm in chosen.algorithm:
            model = quantized(family, algorithm, getattr(torch, chosen.dtype))
            weights = computed_weights(model)
            folder = chosen.out / f"{family}-{algorithm}"
            export_hf_checkpoint(model, export_dir=folder)
            save_file(weights | read_again(folder), chosen.out / f"{family}-{algorithm}.weights.safetensors")
    print(json.dumps({name: version(name) for name in ("nvidia-modelopt", "transformers", "torch")}))


def quantized(family: str, algorithm: str, dtype: torch.dtype) -> PreTrainedModel:
    """A random model of that family as ModelOpt quantizes it."""
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.config.architectures = [type(model).__name__]  # ModelOpt asks for it
    ids_BT = torch.randint(2, 64, (4, 16))
    mtq.quantize(model, settings(algorithm), lambda each: each(ids_BT))
    return model


def settings(algorithm: str) -> dict[str, Any]:
    """ModelOpt's own preset; of a mixed model the first block's FFN in NVFP4 and the rest in FP8."""
    if algorithm == CACHE:
        return update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    if algorithm == MIXED:
        mixed = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
        for each in mtq.NVFP4_DEFAULT_CFG["quant_cfg"]:
            if each.get("cfg") and each["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"):
                mixed["quant_cfg"].append({**each, "quantizer_name": "*layers.0.mlp" + each["quantizer_name"]})
        return mixed
    found: dict[str, Any] = getattr(mtq, ALGORITHMS[algorithm])
    return found


def computed_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the matrix product of every quantized linear gets, before ModelOpt folds and merges for the export."""
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled and quantizer.num_bits != FOUR_BIT_FLOATS:
            found[name] = quantizer(module.weight.detach()).float().contiguous()
    return found


def read_again(folder: Path) -> dict[str, torch.Tensor]:
    """Matrices in NVFP4, which ModelOpt simulates on a GPU only, as its own class decodes what was exported."""
    stored, found = load_file(folder / "model.safetensors"), {}
    for name in [key.removesuffix(".weight_scale_2") for key in stored if key.endswith(".weight_scale_2")]:
        packed = stored[f"{name}.weight"]
        shape = torch.Size((len(packed), 2 * packed.shape[1]))
        scales = stored[f"{name}.weight_scale"], stored[f"{name}.weight_scale_2"]
        codes = NVFP4QTensor(shape, torch.float32, packed)
        found[name] = codes.dequantize(torch.float32, scale=scales[0], double_scale=scales[1], block_sizes={-1: 16})
    return found


if __name__ == "__main__":
    main()
