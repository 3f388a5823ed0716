"""`llmcompress export` and `targets`: options reach their target, and the table is the exporters' own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmcompress.cli.export import export
from llmcompress.cli.targets import SCHEMES, targets
from llmcompress.errors import CompressError
from llmcompress.exporters.base import EXPORTERS
from llmcompress.model_export import export as export_model
from tests.exporters.gguf_models import tiny_quantized, tokenizer


def test_a_saved_folder_is_exported_for_several_targets_with_the_options_of_each(tmp_path: Path) -> None:
    model = tiny_quantized("llama", ["nf4_g32", "int4_g32"])
    export_model(model, "llmcompress", tmp_path / "in", tokenizer=tokenizer(), run=False)
    given = [str(tmp_path / "in"), "--to", "gguf,plain", "-o", str(tmp_path / "out"), "--no-run", "--json"]
    with pytest.raises(CompressError, match="nf4_g32"):
        CliRunner().invoke(export, given, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(export, [*given, "--set", "gguf.instead=Q8_0"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found.keys() == {"gguf", "plain"} and found["gguf"]["converted"] and not found["gguf"]["runtime"]
    assert (tmp_path / "out" / "gguf" / "model.gguf").is_file() and (
        tmp_path / "out" / "plain" / "config.json"
    ).is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--set", "instead=dense"], "is not TARGET.OPTION=VALUE"),
        (["--set", "gguf.insted=dense"], "insted"),
        (["--set", "plain.x=1"], "no target here"),
        (["--to", "ggufff"], "did you mean `gguf`"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_read(settings: list[str], message: str, tmp_path: Path) -> None:
    given = ["builtin:books-llama", "--to", "gguf", "-o", str(tmp_path / "out"), *settings]
    failed = CliRunner().invoke(export, given)
    assert failed.exit_code and message in failed.output + str(failed.exception)


def test_the_table_has_an_answer_of_every_target_for_every_scheme() -> None:
    rows = json.loads(CliRunner().invoke(targets, ["--json"], catch_exceptions=False).stdout)
    assert {(row["scheme"], row["target"]) for row in rows} == {
        (scheme, name) for scheme in SCHEMES for name in EXPORTERS
    }
    by_place = {(row["scheme"], row["target"]): row for row in rows}
    assert by_place["int4_g32", "gguf"]["answer"] == "exact" and by_place["int4_g32", "plain"]["answer"] == "converted"
    assert by_place["int4_g16", "gguf"]["nearest"] == "int4_g32"
    shown = CliRunner().invoke(targets, ["int4_g48", "--inputs", "96"], catch_exceptions=False).stdout
    assert "int4_g48" in shown and "refused (int4_g32)" in shown
