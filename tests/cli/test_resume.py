"""`llmcompress resume` finishes what was interrupted, from the folder of the run alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from llmcompress import CompressError, compress
from llmcompress.cli.main import llmcompress
from llmcompress.model.site import LinearSite
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import write_tiny_llama


@pytest.mark.parametrize("given", ["out", "out.run"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(given: str, tmp_path: Path, monkeypatch) -> None:
    source, replace = write_tiny_llama(tmp_path / "model", intermediate_size=64), LinearSite.replace
    text = "calibration: {samples: 4, tokens: 32}\npasses: [gptq: {scheme: int4_g16}]\nevaluate: {}\n"

    def stop(site: LinearSite, module: torch.nn.Module) -> None:
        if ".1." in site.name:
            raise KeyboardInterrupt
        replace(site, module)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LinearSite, "replace", stop)
        compress(str(source), parse_recipe(text, "r"), tmp_path / "out")
    done = CliRunner().invoke(llmcompress, ["resume", str(tmp_path / given)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    compress(str(source), parse_recipe(text, "r"), tmp_path / "peace")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "peace"))
    assert first.read_bytes() == second.read_bytes()


def test_where_nothing_was_interrupted_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no unfinished run") as refused:
        CliRunner().invoke(llmcompress, ["resume", str(tmp_path / "out")], catch_exceptions=False)
    assert refused.value.exit_code == 2
    (tmp_path / "out").mkdir()
    with pytest.raises(CompressError, match="which is complete"):
        CliRunner().invoke(llmcompress, ["resume", str(tmp_path / "out")], catch_exceptions=False)
