"""The notebook of the documents runs from its first cell to its last, as a user would run it, and shows numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_imports import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(notebook), start=1):
        exec(compile(cell, f"cell {number}", "exec"), names)
    shown = capsys.readouterr().out
    before, after = names["quality"].dense.perplexity, names["measured"].perplexity
    assert before < after < 1.02 * before
    assert after == pytest.approx(names["quality"].compressed.perplexity, rel=5e-3)  # bfloat16 products of the loader
    assert names["quality"].ratio < names["naive"].report.quality[0].ratio
    assert len(names["events"]) > 10 and re.search(r"perplexity \d+\.\d+ → \d+\.\d+", shown)
    assert "→" in names["made"]._repr_html_()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_ten_cells_and_no_stored_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert len(code_cells(notebook)) == 10 and content["nbformat"] == 4
    assert not [cell for cell in content["cells"] if cell.get("outputs") or cell.get("execution_count")]
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
