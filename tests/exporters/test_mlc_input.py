"""A plain folder is what MLC-LLM's converter reads: its files, the config's keys and every tensor that it asks for.

Source: python/mlc_llm of MLC-LLM: support/auto_weight.py, model/llama/llama_model.py (`LlamaConfig`), llama_loader.py.
The package is on no index, so what it asks for is written out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from llmcompress import export
from tests.exporters.gguf_models import tiny_quantized, tokenizer

REQUIRED = {
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size"),
    # without these it takes other numbers without a word: the head size follows from others, theta is 10,000
    *("num_key_value_heads", "head_dim", "rope_theta", "max_position_embeddings", "tie_word_embeddings"),
}


def wanted_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the loader of Llama concatenates or copies."""
    width, ffn, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, shared = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    block = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (shared, width),
        "self_attn.v_proj": (shared, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    found = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }
    table = (config["vocab_size"], width)
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": table}
    return {**found, "model.embed_tokens.weight": table, "model.norm.weight": (width,), **head}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "rope_theta": 5e5}])
def test_a_plain_llama_folder_is_what_mlc_converts(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_quantized("llama", ["int4_g32", "int8_channel"], **changes)
    export(model, "plain", tmp_path / "out", tokenizer=tokenizer(), run=False)
    folder = tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() >= REQUIRED and config["hidden_act"] == "silu"
    assert config["rope_theta"] == changes.get("rope_theta", 10000.0)
    scaling = config.get("rope_scaling")  # it refuses every kind but llama3, and one without a kind is none
    assert scaling is None or "rope_type" not in scaling
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == wanted_tensors(config)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in folder.iterdir()}
