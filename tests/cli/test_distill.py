"""`llmcompress distill` and scripts/distill.py: a student learns from text or from answers, and is a folder."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from llmcompress.cli.main import main
from llmcompress.loading.load import load
from tests.tiny_folder import write_tiny_llama

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "distill.py"
SMALL = ["--set", "calibration.samples=4", "--set", "calibration.tokens=24", "--set", "evaluate={}"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str, str]:
    """A teacher, a student and answered prompts."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"the {word}", "response": " jumps"}) + "\n" for word in ("fox", "dog"))
    )
    sizes: dict[str, Any] = {"dtype": torch.float32, "max_position_embeddings": 128}
    teacher = write_tiny_llama(tmp_path / "teacher", **sizes)
    student = write_tiny_llama(tmp_path / "student", **sizes, hidden_size=16)
    return str(teacher), str(student), str(rows)


def test_the_command_trains_on_text_and_on_answers(folders: tuple[str, str, str], tmp_path: Path) -> None:
    teacher, student, rows = folders
    found = []
    for name, more in (("text", []), ("answers", ["--examples", rows])):
        out = tmp_path / name
        with pytest.raises(SystemExit) as ended:
            main(["distill", teacher, student, "-o", str(out), "--steps", "2", "--json", *more, *SMALL])
        assert ended.value.code == 0
        found.append(load(out)[0].get_input_embeddings().weight)
    before = load(student)[0].get_input_embeddings().weight
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], before)


def test_the_script_does_the_same_from_python(folders: tuple[str, str, str], tmp_path: Path) -> None:
    teacher, student, rows = folders
    script = runpy.run_path(str(SCRIPT), run_name="script")
    arguments = [teacher, student, str(tmp_path / "out"), "--examples", rows, "--steps", "1", "--objective", "jsd"]
    done = CliRunner().invoke(script["main"], arguments)
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output and (tmp_path / "out" / "model.safetensors").exists()
