"""The recipe `w4` runs on a small model of every family of docs/hub-models.md that no other test runs methods on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmcompress import compress
from llmcompress.presets import load_preset
from tests.families import FAMILIES, randomise, tiny_config
from tests.hub_widths import CONFIGS
from tests.tiny_folder import tiny_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 288,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ELSEWHERE = {tiny_config(family).model_type for family in FAMILIES}
HERE = {each["model_type"]: name for name, each in CONFIGS.items() if each["model_type"] not in ELSEWHERE}
"""Family → the last model of the page that is of it."""
SETTINGS = ["calibration={source: builtin:calibration, samples: 4, tokens: 32}", "evaluate={}"]


@pytest.mark.parametrize("family", HERE)
def test_w4_of_a_small_model_of_the_family_loads_in_stock_transformers_with_the_same_logits(
    family: str, tmp_path: Path
) -> None:
    real = CONFIGS[HERE[family]]
    key_value_heads = max(1, 4 * real["num_key_value_heads"] // real["num_attention_heads"])
    tied = {"tie_word_embeddings": real["tie_word_embeddings"]}
    config = AutoConfig.for_model(family, **SIZES, **tied, num_key_value_heads=key_value_heads, head_dim=16)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config)
    randomise(model, 0)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "dense")
    made = compress(str(tmp_path / "dense"), load_preset("w4", settings=SETTINGS), tmp_path / "out")
    assert sum(row.scheme is not None for row in made.report.sites) == 14
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, made.model.float()(tokens).logits, rtol=1e-4, atol=1e-4)
