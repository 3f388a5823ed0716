"""`llmcompress export` and `targets`: options reach their target, and the table is the exporters' own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmcompress.cli.export import export
from llmcompress.cli.report import report
from llmcompress.cli.targets import SCHEMES, targets
from llmcompress.errors import CompressError
from llmcompress.evaluation.device.peak_memory import MemoryRequest
from llmcompress.exporters import runtime_proof
from llmcompress.exporters.base import EXPORTERS
from llmcompress.model_export import export as export_model
from llmcompress.records.cost import Memory
from llmcompress.records.export_report import ExportReport
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


def test_a_fresh_process_measures_memory_only_where_it_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    asked: list[MemoryRequest] = []

    def measured(request: MemoryRequest) -> list[Memory]:
        asked.append(request)
        return [Memory(instrument="a gauge", running=5_000_000)]

    monkeypatch.setattr(runtime_proof, "peak_memory", measured)
    model = tiny_quantized("llama", ["int4_g32"])
    for memory in (False, True):
        folder = tmp_path / str(memory)
        made = export_model(model, "gguf", folder, tokenizer=tokenizer(), memory=memory)["gguf"]
        assert made.runtime is not None and (made.runtime.memory is not None) == memory == bool(asked)
    assert asked[0].runtime == "llama_cpp" and Path(asked[0].model).name.startswith(".True")
    done = CliRunner().invoke(report, [str(folder), "-o", str(tmp_path / "report")], catch_exceptions=False)
    assert done.exit_code == 0
    told = (tmp_path / "report" / "report.md").read_text()
    assert "5.0 MB" in told and "perplexity in llama.cpp" in told and "tensors were read back" in told
    assert ExportReport.model_validate_json((tmp_path / "report" / "report.json").read_text()) == made
    assert "Q4_0" in (tmp_path / "report" / "report.html").read_text()


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
    words = " ".join(shown.replace("\N{NO-BREAK SPACE}", " ").split())  # lines break where a target more or less is
    assert "int4_g48 exact archive," in words and "gguf (int4_g32)" in words
