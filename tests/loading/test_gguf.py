"""A GGUF file is a model like any other: evaluated, inspected, compressed, exported again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress import compress, evaluate, export, inspect, load
from llmcompress.errors import CompressError
from llmcompress.loading.source import find_source, local_source
from tests.exporters.gguf_models import tiny, tiny_quantized, tokenizer, written

IDS_BT = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_read_with_what_lies_beside_it_or_by_what_it_says_itself(cache: Path, tmp_path: Path) -> None:
    model = tiny_quantized("llama")
    made = tmp_path / "out"
    export(model, "gguf", made, tokenizer=tokenizer(), run=False)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes((made / "model.gguf").read_bytes())
    for name in (made, made / "model.gguf", alone):
        again, its_tokenizer = load(str(name), dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(again(IDS_BT).logits, model(IDS_BT).logits, rtol=0, atol=1e-5)
        assert its_tokenizer("the lazy dog")["input_ids"] == tokenizer()("the lazy dog")["input_ids"]
    assert len(list((cache / "gguf").iterdir())) == 2  # one for each file, however it was named
    assert find_source(str(made), as_it_is=True).folder == made


def test_a_file_is_evaluated_inspected_and_compressed(cache: Path, tmp_path: Path) -> None:
    written(tiny("llama"), tmp_path)
    file, text = str(tmp_path / "model.gguf"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and the small model learns to read " * 20)
    (tmp_path / "config.json").unlink()
    (perplexity,) = [each for each in evaluate(file, str(text)).measurements if each.kind == "perplexity"]
    assert perplexity.tokens > 100 and inspect(file)["family"] == "llama"
    made = compress(file, {"passes": [{"rtn": {"scheme": "int4_g32"}}], "evaluate": {}}, tmp_path / "out")
    assert made.report.model == file and made.report.sites


def test_16_bit_files_stay_16_bit_and_codes_become_float32(cache: Path, tmp_path: Path) -> None:
    for name, model, dtype in (
        ("dense", tiny("llama"), torch.bfloat16),
        ("codes", tiny_quantized("llama"), torch.float32),
    ):
        written(model, tmp_path / name)
        assert load(str(tmp_path / name)).model.dtype == dtype


def test_what_transformers_would_read_as_another_model_is_refused(cache: Path, tmp_path: Path) -> None:
    written(tiny("llama_3.1"), tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(CompressError, match=r"does not read its `rope_freqs.weight`") as told:
        find_source(str(tmp_path / "a"))
    assert "config.json" in told.value.fix
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, it says")
    with pytest.raises(CompressError, match="cannot be read"):
        find_source(str(tmp_path / "broken.gguf"))


def test_asking_whether_a_file_is_there_reads_nothing(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"anything")
    found = local_source(str(tmp_path / "model.gguf"))
    assert found is not None and found.gguf == tmp_path / "model.gguf" and not cache.exists()
