"""What a failure shows never holds an access token."""

from __future__ import annotations

import json

import click
import pytest

from llmcompress.cli.failures import report_failure
from llmcompress.errors import CompressError

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
FAILURES = [
    CompressError("hub.refused", f"{TOKEN} may not read it", where=f"https://x/{TOKEN}", fix=f"renew {TOKEN}"),
    OSError(28, f"No space left for {TOKEN}"),
    ValueError(f"bug with {TOKEN}"),
]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_no_failure_shows_a_token(
    failure: Exception, as_json: bool, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report_failure(failure, as_json=as_json)
    shown = "".join(capsys.readouterr())
    assert "hf_***" in shown and TOKEN not in shown
    assert not as_json or json.loads(shown)["error"]["code"]
    assert all(TOKEN not in file.read_text() for file in tmp_path.iterdir())


@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_command_line_is_shown_without_its_token(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(click.UsageError(f"no such option {TOKEN}"), as_json=as_json)
    shown = "".join(capsys.readouterr())
    assert TOKEN not in shown and "no such option hf_***" in shown
