"""Memory, disks and tools that fail in the middle: what is kept, and that the same command goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from llmcompress import CompressError, compress
from llmcompress.exporters.gguf import GgufExporter
from llmcompress.model.site import LinearSite
from llmcompress.recipe import parse_recipe
from llmcompress.storage.folder import staging_folder
from tests.tiny_folder import write_tiny_llama

GPTQ = "calibration: {samples: 4, tokens: 32}\npasses: [gptq: {scheme: int4_g16}]\nevaluate: {}\n"


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_f1_memory_that_runs_out_keeps_the_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, replace = write_tiny_llama(tmp_path / "model", intermediate_size=64), LinearSite.replace

    def full(site: LinearSite, module: torch.nn.Module) -> None:
        if ".1." in site.name:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        replace(site, module)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as stopped:
        patch.setattr(LinearSite, "replace", full)
        compress(str(source), parse_recipe(GPTQ, "r"), tmp_path / "out")
    assert any("1 finished block" in note for note in stopped.value.__notes__)
    compress(str(source), parse_recipe(GPTQ, "r"), tmp_path / "out")
    compress(str(source), parse_recipe(GPTQ, "r"), tmp_path / "in-peace")
    assert digest(tmp_path / "out") == digest(tmp_path / "in-peace")


def test_f9_what_is_unfinished_lies_beside_the_output(tmp_path: Path) -> None:
    """A rename across file systems is a copy, and a copy can be seen half done."""
    output = tmp_path / "deep" / "out"
    output.parent.mkdir()
    with staging_folder(output) as staging:
        assert staging.parent == output.parent


def test_f10_compressing_needs_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_llama(tmp_path / "model", intermediate_size=64)
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    compress(str(source), parse_recipe(GPTQ, "r"), tmp_path / "out", offload="always")
    assert (tmp_path / "out" / "config.json").is_file()


def test_h9_an_export_that_fails_leaves_the_hugging_face_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_llama(tmp_path / "model", intermediate_size=64)
    recipe = parse_recipe("passes: [rtn: {scheme: int4_g32}]\nevaluate: {}\nexport: [gguf, plain]\n", "r")

    def failing(*_: object) -> None:
        raise CompressError("export.test", "the tool stopped")

    monkeypatch.setattr(GgufExporter, "write", failing)
    with pytest.raises(CompressError, match="the tool stopped") as stopped:
        compress(str(source), recipe, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file() and str(tmp_path / "out") in stopped.value.saved
    assert (tmp_path / "out-plain" / "config.json").is_file(), "other targets go on"
    assert not (tmp_path / "out-gguf").exists()
