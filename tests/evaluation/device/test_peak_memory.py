"""Peak memory is that of a process that only runs the model, and where it cannot be had there is a reason."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from llmcompress.evaluation.device import peak_memory as module
from llmcompress.evaluation.device.peak_memory import MemoryRequest, measure, peak_memory
from tests.tiny_folder import write_tiny_llama
from tests.warm_python import Done, WarmPython


def request(model: Path, *settings: tuple[int, int]) -> MemoryRequest:
    return MemoryRequest(str(model), "torch", "cpu", "float32", torch.get_num_threads(), settings, new_tokens=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model")


def test_the_high_water_mark_is_read_from_the_kernel_and_reset_before_every_row(folder: Path, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "status").write_text("Name:\tpython\nVmHWM:\t   2000 kB\nVmRSS:\t 1500 kB\n")
    found = measure(request(folder, (1, 4), (2, 8)), proc=proc)
    assert [row.running for row in found] == [2000 * 1024] * 2 and found[0].loading == 2000 * 1024
    assert (proc / "clear_refs").read_text() == "5\n" and "reset before every row" in (found[0].instrument or "")
    (proc / "clear_refs").unlink()
    (proc / "clear_refs").mkdir()
    assert "does not reset it" in (measure(request(folder, (1, 4)), proc=proc)[0].instrument or "")


def test_a_fresh_process_answers_in_a_file_and_a_larger_batch_takes_at_least_its_hidden_states_more(
    folder: Path, our_python: WarmPython
) -> None:
    def run(command: list[str], **options: object) -> Done:
        assert command[1:4] == ["-P", "-m", module.__name__]
        program = f"import sys\nfrom {module.__name__} import main\nmain(sys.argv[1:])"
        return our_python.run(program, *command[4:], imports_us=True)

    asked = request(folder, (1, 4), (2048, 48))
    small, large = peak_memory(asked, run=run)
    assert large.unavailable is None and large.libraries is not None and large.running and small.running
    hidden_bytes = 2048 * 48 * 32 * 4
    assert large.running - small.running > hidden_bytes


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [
        (-9, "", "ended by signal 9"),
        (1, "Traceback\nValueError: no room", "failed: ValueError: no room"),
        (0, "", "it said nothing"),
    ],
)
def test_a_process_that_fails_leaves_a_reason_for_every_row(code: int, stderr: str, reason: str) -> None:
    rows = peak_memory(
        request(Path("none"), (1, 4), (1, 8)),
        run=lambda command, **_: subprocess.CompletedProcess(command, code, "", stderr),
    )
    assert len(rows) == 2 and all(row.running is None and reason in (row.unavailable or "") for row in rows)
    assert json.loads(rows[0].model_dump_json())["instrument"] is None
