"""Tiny random models of every family the tests run on: same code under transformers 4.57 and 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCABULARY = 128
HIDDEN = 64
FFN = 96
"""Divides into groups of 32, is no power of two and differs from the hidden size; `llama_odd` has odd sizes."""


def _config(model_type: str, **options: Any) -> Callable[[], PretrainedConfig]:
    """A config factory: sizes shared by all families, overridden by `options`."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "use_cache": True,
    }

    def make() -> PretrainedConfig:
        return AutoConfig.for_model(model_type, **{**shared, **options})

    return make


def _gated(model_type: str, **options: Any) -> Callable[[], PretrainedConfig]:
    """A Llama-like config: gated FFN, rotary positions, grouped-query attention unless overridden."""
    sizes = {"intermediate_size": FFN, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return _config(model_type, **{**sizes, **options})


_EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _gated("llama", num_key_value_heads=4),
    "llama_gqa": _gated("llama", tie_word_embeddings=True),
    "llama_odd": _gated(
        "llama", hidden_size=42, num_attention_heads=3, num_key_value_heads=1, intermediate_size=75, vocab_size=131
    ),
    "mistral": _gated("mistral", sliding_window=5),
    "qwen2": _gated("qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": _gated("qwen3", head_dim=24),
    "gemma2": _gated("gemma2", num_hidden_layers=4, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    "phi": _gated("phi", num_key_value_heads=4),
    "phi3": _gated("phi3", original_max_position_embeddings=128, sliding_window=None),
    "opt": _config("opt", ffn_dim=FFN, max_position_embeddings=128, word_embed_proj_dim=HIDDEN),
    "gpt2": _config("gpt2", n_embd=HIDDEN, n_layer=3, n_head=4, n_inner=FFN, n_positions=128),
    "gpt_neox": _config("gpt_neox", intermediate_size=FFN, max_position_embeddings=128, rotary_pct=0.5),
    "gpt_neox_sequential": _config(
        "gpt_neox", intermediate_size=FFN, max_position_embeddings=128, use_parallel_residual=False
    ),
    "falcon": _config("falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=FFN, bias=False),
    "falcon_mqa": _config("falcon", new_decoder_architecture=False, multi_query=True, ffn_hidden_size=FFN, bias=False),
    "falcon_old": _config(
        "falcon",
        new_decoder_architecture=False,
        multi_query=False,
        parallel_attn=False,
        ffn_hidden_size=FFN,
        bias=True,
        alibi=True,
    ),
    "bloom": _config("bloom", n_layer=3, n_head=4),
    "olmo2": _gated("olmo2"),
    "stablelm": _gated("stablelm", use_qkv_bias=True),
    "stablelm_parallel": _gated("stablelm", use_parallel_residual=True, use_qkv_bias=True),
    "cohere": _gated("cohere"),
    "mixtral": _gated("mixtral", num_local_experts=4, sliding_window=None, **_EXPERTS),
    "qwen3_moe": _gated("qwen3_moe", head_dim=16, num_experts=4, moe_intermediate_size=32, **_EXPERTS),
}
"""Name → a fresh tiny config. A new family is one row here and nothing else."""


def tiny_config(family: str) -> PretrainedConfig:
    """A fresh config of the family."""
    return FAMILIES[family]()


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family with random, non-degenerate weights, in eval mode; same seed, same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
    randomise(model, seed)
    return model.to(dtype).eval()


def tiny_tokens(family: str, batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids of the family's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_config(family).vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Norm gains 0.5–1.5 (around their own start value), biases non-zero, linears N(0, 1/inputs)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, nn.Embedding):
                parameter.copy_(noise)
            elif "bias" in name:
                parameter.copy_(0.3 * noise)
            elif "norm" in type(module).__name__.lower() or parameter.dim() == 1:
                start = parameter.mean().round()
                parameter.copy_(start + torch.rand(parameter.shape, generator=generator) - 0.5)
            else:
                inputs = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
                parameter.copy_(noise * inputs**-0.5)
