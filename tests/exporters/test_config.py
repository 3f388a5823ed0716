"""config.json says everything twice where transformers 4 and 5 use different words."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmcompress.exporters.config import portable_config
from llmcompress.loading.rotary import rotary_as_in_4
from tests.families import FAMILIES, tiny_config, tiny_model

ROTARY = [name for name in FAMILIES if "rope_theta" in str(tiny_config(name).to_dict())]


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_base_is_at_the_top_level(family):
    assert portable_config(tiny_model(family), torch.bfloat16)["rope_theta"] == _base(family)


def _base(family: str) -> float:
    data = tiny_config(family).to_dict()
    base: float = (data.get("rope_parameters") or data)["rope_theta"]
    return base


def test_the_stored_type_is_named_in_both_spellings():
    data = portable_config(tiny_model("llama"), torch.float16)
    assert data["dtype"] == data["torch_dtype"] == "float16"


def test_experts_are_counted_under_the_name_of_each_major():
    data = portable_config(tiny_model("qwen3_moe"), torch.bfloat16)
    assert data["num_experts"] == 4


def test_scaled_positions_are_spelled_for_4():
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    spelled = rotary_as_in_4(scaled)
    assert spelled["rope_theta"] == 500.0 and spelled["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert rotary_as_in_4({"rope_type": "default", "rope_theta": 500.0})["rope_scaling"] is None


def test_partial_rotation_and_local_tables_are_spelled_for_4():
    partial = rotary_as_in_4({"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25})
    assert partial["partial_rotary_factor"] == partial["rotary_pct"] == 0.25 and partial["rotary_emb_base"] == 500.0
    kinds = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    local = rotary_as_in_4(kinds)
    assert (local["rope_theta"], local["rope_local_base_freq"], local["rope_scaling"]) == (1e6, 1e4, None)


def test_the_live_configuration_is_not_changed():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=8))
    before = model.config.to_dict()
    portable_config(model, torch.float16)
    assert model.config.to_dict() == before
