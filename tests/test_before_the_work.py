"""What a run would refuse later is refused before its work, a dry run refuses it too, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from llmcompress import CompressError, compress, plan
from llmcompress.cli.main import main
from llmcompress.cli.terminal import TerminalProgress
from llmcompress.errors import ExitCode
from llmcompress.recipe import Recipe, parse_recipe
from llmcompress.run import Run
from tests.tiny_folder import write_tiny_llama

SETTINGS = {"recipe": "abc"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def _recipe(*, source: str = "builtin:calibration", text: str = "builtin:evaluation") -> Recipe:
    return parse_recipe(
        f"calibration: {{source: '{source}', samples: 4, tokens: 32}}\npasses: [{{gptq: {{scheme: int8_channel}}}}]\n"
        f"evaluate: {{perplexity: [{{source: '{text}', window: 32, max_windows: 2}}]}}",
        "test",
    )


@pytest.mark.parametrize("named", ["./missing.txt", "builtin:missing"])
@pytest.mark.parametrize("use", ["source", "text"])
def test_a_missing_text_is_refused_by_the_plan_and_leaves_no_run(
    use: str, named: str, tiny: Path, tmp_path: Path
) -> None:
    wrong = _recipe(**{use: named})
    for refusing in (lambda: plan(str(tiny), wrong), lambda: compress(str(tiny), wrong, tmp_path / "out")):
        with pytest.raises(CompressError) as caught:
            refusing()
        assert caught.value.code == "data.not-found"
    assert not list(tmp_path.iterdir())


def test_a_refusal_after_weights_were_put_on_disk_leaves_no_run(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(CompressError) as caught:
        compress(str(tiny), _recipe(text=str(tmp_path / "empty.txt")), tmp_path / "out", offload="always")
    assert caught.value.code == "data.empty" and [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_after_an_unreadable_text_the_corrected_command_runs(tiny: Path, tmp_path: Path) -> None:
    """An empty file is only found when it is read, in a run that has begun."""
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(CompressError) as caught:
        compress(str(tiny), _recipe(source=str(tmp_path / "empty.txt")), tmp_path / "out")
    assert caught.value.code == "data.empty" and not (tmp_path / "out.run").exists()
    compress(str(tiny), _recipe(), tmp_path / "out")


def test_a_run_that_kept_nothing_is_started_anew_with_other_settings(tmp_path: Path) -> None:
    killed = Run.open(tmp_path / "out", fingerprint=SETTINGS, lock_text="old", fresh=False)
    killed._lock.release()
    with Run.open(tmp_path / "out", fingerprint={"recipe": "other"}, lock_text="new", fresh=False) as run:
        assert (run.folder / "lock.yaml").read_text() == "new"


@pytest.mark.parametrize("torn", ["", '{"recipe": "a', "[1]"])
def test_a_torn_fingerprint_of_a_run_that_kept_nothing_is_written_anew(torn: str, tmp_path: Path) -> None:
    Run.open(tmp_path / "out", fingerprint=SETTINGS, lock_text="", fresh=False)._lock.release()
    (tmp_path / "out.run" / "fingerprint.json").write_text(torn)
    with Run.open(tmp_path / "out", fingerprint=SETTINGS, lock_text="", fresh=False) as run:
        assert json.loads((run.folder / "fingerprint.json").read_text()) == SETTINGS


def test_a_torn_fingerprint_of_a_run_that_kept_a_block_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with Run.open(tmp_path / "out", fingerprint=SETTINGS, lock_text="", fresh=False) as run:
        run.save_block(0, 0, nn.Linear(2, 2), nn.Linear(2, 2), [])
        (run.folder / "fingerprint.json").write_text('{"rec')
    with pytest.raises(CompressError) as caught:
        Run.open(tmp_path / "out", fingerprint=SETTINGS, lock_text="", fresh=False)
    assert caught.value.code == "run.damaged" and "`fresh=True`" in caught.value.fix
    with Run.open(tmp_path / "out", fingerprint=SETTINGS, lock_text="", fresh=True) as run:
        assert run.finished_blocks(0) == []


@pytest.mark.parametrize("where", ["missing/decided.yaml", "."])
def test_allocate_refuses_a_file_it_cannot_write_before_the_work(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["allocate", "no/such-model", "--recipe", "none.yaml", "-o", str(tmp_path / where), "--overwrite"])
    assert ended.value.code == ExitCode.USAGE and "output.unwritable" in capsys.readouterr().err


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C interrupts: the background jobs of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", ["substep", "step"])
def test_an_interrupt_says_what_is_really_saved(
    number: signal.Signals, moment: str, tiny: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """While the first block is worked on, nothing is; once it is done, it is."""
    real, before = getattr(TerminalProgress, moment), signal.getsignal(signal.SIGTERM)
    compressing: list[str] = []

    def stage(progress: TerminalProgress, title: str, steps: int) -> None:
        compressing[:] = [title]

    def stopping(progress: TerminalProgress, *given: str, **options: int) -> None:
        real(progress, *given, **options)
        if compressing == ["compress"]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TerminalProgress, "stage", stage)
    monkeypatch.setattr(TerminalProgress, moment, stopping)
    (tmp_path / "recipe.yaml").write_text(_recipe().to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(tiny), "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")])
    shown = capsys.readouterr().err
    expected = ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED
    assert ended.value.code == expected and signal.getsignal(signal.SIGTERM) is before
    kept = moment == "step"
    assert ("1 finished block" in shown) == ("run the same command again" in shown) == kept
    assert ("nothing was written" in shown) != kept and (tmp_path / "out.run").exists() == kept
