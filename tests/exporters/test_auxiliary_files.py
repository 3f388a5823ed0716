"""Tokenizer, chat template, generation settings and licence travel with the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from llmcompress.exporters.auxiliary_files import copy_auxiliary_files
from tests.tiny_folder import edit_json, write_tiny_llama

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def source(tmp_path) -> Path:
    folder = write_tiny_llama(tmp_path / "source")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "LICENSE").write_text("free")
    (folder / "NOTICE.txt").write_text("by us")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path / "out").mkdir()
    return folder


def test_companions_are_copied_byte_for_byte_and_nothing_else_is(source, tmp_path):
    out = tmp_path / "out"
    names = copy_auxiliary_files(source, out)
    wanted = {"LICENSE", "NOTICE.txt", "chat_template.jinja", "generation_config.json", "tokenizer.json"}
    assert wanted <= set(names)
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not {"model.safetensors", "config.json", "modeling_evil.py", "pytorch_model.bin"} & set(names)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_what_the_source_lacks_is_written_from_the_objects(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    bare = tmp_path / "bare"
    bare.mkdir()
    # a combination that `save_pretrained` refuses
    names = copy_auxiliary_files(bare, tmp_path / "out", tokenizer, GenerationConfig(do_sample=False, temperature=0.5))
    assert "tokenizer.json" in names and "generation_config.json" in names
    ids = tokenizer("the lazy dog")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the lazy dog")["input_ids"] == ids


def test_a_tokenizer_saved_by_5_is_respelled_for_4(source, tmp_path):
    edit_json(
        source / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<s>"], keep="me"
    )
    copy_auxiliary_files(source, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["keep"] == "me"
    assert settings["additional_special_tokens"] == ["<s>"] and "extra_special_tokens" not in settings
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the dog")["input_ids"]
