"""A tiny trained-nothing Llama as an ordinary Hugging Face folder, to be damaged in tests."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCE = "the quick brown fox jumps over the lazy dog and the small model learns to read"


def write_tiny_llama(folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **options: Any) -> Path:
    """Two layers, hidden 32, grouped-query attention, untied head."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<s>", eos_token="</s>")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 288,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    fast.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Tokenizer:
    """280 byte-level tokens, of which two are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE], trainer)
    return tokenizer


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys; None removes them."""
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def with_a_far_token(folder: Path) -> None:
    """Gives the tokenizer words up to 299 and `<far>` = 300; from 288 on they lie beyond the embedding's rows."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    template = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"].append({**template, "id": 300, "content": "<far>", "special": True})
    for number in range(len(tokenizer["model"]["vocab"]), 300):
        tokenizer["model"]["vocab"][f"filler{number}"] = number
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def edit_tensors(file: Path, **changes: Tensor | None) -> None:
    """Replace tensors (`__` stands for a dot); None removes them."""
    tensors = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})


def raw_safetensors(file: Path, header: dict[str, Any], data: bytes) -> None:
    """A file with exactly this header."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
