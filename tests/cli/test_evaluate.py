"""`evaluate`, `compare` and `report` on tiny folders: what is printed, written, kept after a failure, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.cli.main import main
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.metrics.perplexity import PerplexityMetric
from llmcompress.suites import load_suite, suite_names, suite_summary
from tests.tiny_folder import write_tiny_llama

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--perplexity", "builtin:evaluation", "--window", "48", "--max-windows", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with the same tokenizer: one has twice the layers."""
    root = tmp_path_factory.mktemp("models")
    return write_tiny_llama(root / "dense"), write_tiny_llama(root / "other", num_hidden_layers=1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return command


def test_a_report_is_written_and_one_value_printed(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    dense, other = map(str, folders)
    code, out, _ = run("evaluate", other, "--baseline", dense, *SMALL, "-o", "report", "--json")
    assert code == 0
    found = json.loads(out)
    assert {each["kind"] for each in found["measurements"]} >= {"perplexity", "divergence", "weight_bytes"}
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"report.html", "report.md", "report.json"}
    code, out, _ = run("compare", "report", "report", "-o", "both", "--json")
    assert code == 0 and len(json.loads(out)["evaluations"]) == 2
    code, out, _ = run("report", "both", "-o", "again", "--json")
    assert code == 0 and json.loads(out) == {"output": "again"}


def test_a_gate_that_is_not_kept_is_exit_6_and_still_one_value(run: Run, folders: tuple[Path, Path]) -> None:
    dense, other = map(str, folders)
    code, out, err = run("evaluate", other, "--baseline", dense, *SMALL, "--gate", "kl_mean=0.0", "--json")
    assert code == ExitCode.GATE and "gate" in {each["kind"] for each in json.loads(out)["measurements"]}
    assert "the quality gate is not kept" in err


def test_what_was_finished_before_a_failure_is_kept_and_the_same_command_goes_on(
    run: Run, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for number in range(3):
        texts.append(tmp_path / f"text{number}.txt")
        texts[-1].write_text(f"{number} the quick brown fox jumps over the lazy dog and learns to read\n" * 10)
    command = ["evaluate", str(folders[0]), "--window", "48", "--max-windows", "2", "-o", "report"]
    command += [word for text in texts for word in ("--perplexity", str(text))]
    observe, seen = PerplexityMetric.observe, []

    def fail_at_the_third(self, runner, progress, *, dense):  # type: ignore[no-untyped-def]
        seen.append(self.name)
        if len(seen) == 3:
            raise CompressError("data.broken", "the third text is broken")
        return observe(self, runner, progress, dense=dense)

    monkeypatch.setattr(PerplexityMetric, "observe", fail_at_the_third)
    code, _, err = run(*command)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert code == ExitCode.REFUSED and "report: the same command goes on" in err
    assert [each["text"] for each in found["measurements"] if each["kind"] == "perplexity"] == seen[:2]
    assert found["unfinished"] == seen[2:]
    code, _, _ = run(*command)
    assert code == 0 and seen[3:] == [seen[2]], "only the third is measured"
    assert not json.loads((tmp_path / "report" / "report.json").read_text())["unfinished"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--suite", "quik"), "did you mean `quick`"),
        (("--gate", "kl_men=0.1"), "did you mean `kl_mean`"),
        (("--gate", "kl_mean=0.1"), "none is given"),
        (("--gate", "kl_mean"), "neither a limit nor a YAML file"),
        (("--whole-text", "--max-windows", "3"), "exclude each other"),
        (("--limit", "3"), "name tasks"),
        (("--task-data", "x"), "name tasks"),
        (("--track", "wandbb"), "did you mean `wandb`"),
        (("--protocol", "gptqq"), "did you mean `gptq`"),
    ],
)
def test_words_that_make_no_sense_are_refused(run: Run, folders: tuple[Path, Path], words: tuple[str, ...], said: str):
    code, out, err = run("evaluate", str(folders[0]), *words)
    assert code == ExitCode.USAGE and said in err and not out


def test_models_and_reports_are_not_mixed(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "report.json").write_text("{}")
    code, _, err = run("compare", str(folders[0]), "saved")
    assert code == ExitCode.USAGE and "models alone, or reports alone" in err


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_is_read_and_says_what_it_is(name: str) -> None:
    assert load_suite(name) and len(suite_summary(name)) > 20
