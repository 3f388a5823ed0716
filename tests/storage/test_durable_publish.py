"""A published folder survives a power cut: what it holds is on the disk before its name is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.storage.folder import publish
from llmcompress.storage.names import FILES
from llmcompress.storage.ownership import mark_output


@pytest.mark.parametrize("replaced", [False, True])
def test_all_files_and_their_folder_are_synced_before_the_folder_gets_its_name(
    replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, output = tmp_path / ".model.tmp-12345678", tmp_path / "model"
    for folder in (staging, output) if replaced else (staging,):
        (folder / "deeper").mkdir(parents=True)
        (folder / "config.json").write_text(folder.name)
        (folder / "deeper" / "notes").write_text(folder.name)
        save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
        mark_output(folder, ["config.json", "deeper/notes", "model.safetensors"])
    inodes = {path.stat().st_ino: path.name for path in (staging, *staging.rglob("*"), tmp_path)}
    done: list[str] = []

    def noting(real: Callable[..., Any], what: Callable[..., str]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            done.append(what(*given))
            return real(*given)

        return call

    monkeypatch.setattr(os, "fsync", noting(os.fsync, lambda handle: inodes[os.fstat(handle).st_ino]))
    monkeypatch.setattr(os, "rename", noting(os.rename, lambda old, new: f"{Path(old).name} becomes {Path(new).name}"))
    publish(staging, output, overwrite=replaced)
    named = done.index(".model.tmp-12345678 becomes model")
    first = next(place for place, what in enumerate(done) if "becomes" in what)
    assert set(done[:first]) == {".model.tmp-12345678", "config.json", "deeper", "notes", "model.safetensors", FILES}
    assert done[named + 1 :] == [tmp_path.name], "the new name is synced too"
