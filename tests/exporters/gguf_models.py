"""Tiny models of every architecture of GGUF, their tokenizer, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llmcompress.exporters.base import Writing
from llmcompress.exporters.gguf import GgufExporter
from llmcompress.model.experts import unfuse_experts
from tests.exporters.quantized import quantize
from tests.families import randomise
from tests.tiny_folder import tiny_tokenizer

SCHEMES = ["int4_g32", "int8_channel", "int5_g64"]
"""Three, as an expert has three linears: so all experts of a block get the same."""

_LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied_biased": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama_wide_heads": {"model_type": "llama", "head_dim": 32, "num_key_value_heads": 1},
    "llama_3.1": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA_3, "original_max_position_embeddings": 16},
    },
    "llama_linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_yarn": {
        "model_type": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {"model_type": "qwen2_moe", **_EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"model_type": "qwen3_moe", **_EXPERTS, "norm_topk_prob": True, "head_dim": 16},
    "phi3": {"model_type": "phi3"},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 6,
    },
}


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """One of `MODELS`, random, in float32 with values of bfloat16."""
    sizes = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = AutoConfig.for_model(**{**sizes, **MODELS[name], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 0)
    for parameter in model.parameters():  # not the rotary tables
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model.eval()


def tiny_quantized(name: str, schemes: list[str] | None = None, **changes: Any) -> PreTrainedModel:
    """The same with codes in its blocks."""
    model = tiny(name, **changes)
    unfuse_experts(model)
    quantize(model, schemes or SCHEMES)
    return model


def tokenizer() -> PreTrainedTokenizerBase:
    """280 byte-level tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<s>", eos_token="</s>")


def written(
    model: PreTrainedModel, folder: Path, *, dtype: torch.dtype = torch.bfloat16, exporter: GgufExporter | None = None
) -> Writing:
    """Write `model.gguf` there; how it was written."""
    writing = Writing(dtype, tokenizer=tokenizer(), model_name="org/tiny")
    (exporter or GgufExporter()).write(model, folder, writing)
    return writing
