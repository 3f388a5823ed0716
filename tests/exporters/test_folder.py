"""The output folder is refused early or replaced in one step: old or new, never a mixture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.errors import CompressError, ExitCode
from llmcompress.storage.disk import disk_errors
from llmcompress.storage.folder import check_output, publish, staging_folder
from llmcompress.storage.ownership import mark_output

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, sys
from pathlib import Path
from llmcompress.storage import folder
steps = iter(range(100))
stop = int(sys.argv[3])
def counted(real):
    def call(*args, **options):
        if next(steps) == stop:
            os._exit(9)
        return real(*args, **options)
    return call
folder.sync, folder.sha256 = counted(folder.sync), counted(folder.sha256)
os.rename = counted(os.rename)
os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
folder.publish(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=True)
"""


def _fill(folder: Path, what: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        save_file({name: torch.full((3,), float(len(what)))}, folder / f"model-{name}.safetensors")
    for name in ("config.json", "only-" + what):
        (folder / name).write_text(what)
    mark_output(folder, [path.name for path in folder.iterdir()])
    return folder


def _holds(folder: Path) -> str | None:
    """`old` or `new` when the folder is complete."""
    if not folder.exists():
        return None
    what = (folder / "config.json").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "llmcompress_files.json", "model-a.safetensors", "model-b.safetensors", "only-" + what]
    )
    return what


def _run_killed(staging: Path, output: Path, step: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(staging), str(output), str(step)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode in (0, 9), done.stderr.decode()
    return done.returncode


def test_killed_at_any_step_leaves_old_or_new_and_the_next_run_clears_up(tmp_path):
    """One process per point of death would take a minute of imports: children are forked from one parent."""
    output, seen = tmp_path / "model", []
    for step in range(100):
        for left in tmp_path.iterdir():
            _remove(left)
        _fill(output, "old")
        staging = _fill(tmp_path / ".model.tmp-12345678", "new")
        killed = _killed_in_fork(staging, output, step)
        between = _holds(output)
        check_output(output, overwrite=True)
        after = _holds(output)
        assert after in ("old", "new") and between in (after, None)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        seen.append((between, after))
        if not killed:
            break
    assert seen[0] == ("old", "old") and seen[-1] == ("new", "new") and len(seen) > 10
    assert seen.count((None, "old")) <= 1, "the only moment without an output is between the two renames"


def test_killed_for_real_leaves_the_old_one(tmp_path):
    _fill(tmp_path / "model", "old")
    assert _run_killed(_fill(tmp_path / ".model.tmp-12345678", "new"), tmp_path / "model", 3) == 9
    assert _holds(tmp_path / "model") == "old"


def _killed_in_fork(staging: Path, output: Path, step: int) -> bool:
    child = os.fork()
    if child == 0:
        sys.argv = ["", str(staging), str(output), str(step)]
        try:
            exec(KILLED, {})
        except BaseException:
            os._exit(7)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9


def _remove(path: Path) -> None:
    for inner in path.iterdir() if path.is_dir() else ():
        _remove(inner)
    path.rmdir() if path.is_dir() else path.unlink()


def test_publish_moves_a_complete_folder_and_tells_its_hashes(tmp_path):
    output = tmp_path / "deep" / "model"
    with staging_folder(output) as staging:
        assert staging.parent == output.parent
        _fill(staging, "new")
        hashes = publish(staging, output, overwrite=False)
    assert _holds(output) == "new" and len(hashes) == 5 and all(len(value) == 64 for value in hashes.values())
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_an_error_while_saving_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), staging_folder(tmp_path / "model") as staging:
        _fill(staging, "new")
        raise RuntimeError("boom")
    assert not list(tmp_path.iterdir())


def test_a_damaged_weight_file_is_not_published(tmp_path):
    staging = _fill(tmp_path / "staging", "new")
    file = staging / "model-b.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CompressError) as caught:
        publish(staging, tmp_path / "model", overwrite=False)
    assert caught.value.where == "model-b.safetensors" and not (tmp_path / "model").exists()


def test_an_index_that_names_other_tensors_is_not_published(tmp_path):
    staging = _fill(tmp_path / "staging", "new")
    (staging / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-a.safetensors"}}')
    with pytest.raises(CompressError) as caught:
        publish(staging, tmp_path / "model", overwrite=False)
    assert caught.value.code == "output.unreadable"


def _refused(output: Path, *, overwrite: bool = False, **options: int) -> CompressError:
    with pytest.raises(CompressError) as caught:
        check_output(output, overwrite=overwrite, **options)
    return caught.value


def test_a_filled_output_is_refused_unless_overwritten(tmp_path):
    _fill(tmp_path / "model", "old")
    error = _refused(tmp_path / "model")
    assert error.exit_code == ExitCode.USAGE and "`overwrite=True`" in error.fix
    check_output(tmp_path / "model", overwrite=True)
    assert _holds(tmp_path / "model") == "old"


def test_an_empty_or_absent_output_is_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)
    check_output(tmp_path / "a" / "b" / "c", overwrite=False)
    with staging_folder(tmp_path / "empty") as staging:
        publish(_fill(staging, "new"), tmp_path / "empty", overwrite=False)
    assert _holds(tmp_path / "empty") == "new"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    assert _refused(tmp_path / "model", overwrite=True).code == "output.is-file"


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused = _refused(tmp_path / "file" / "model")
    assert refused.code == "output.is-file" and str(tmp_path / "file") in refused.what


@pytest.mark.parametrize("where", ["here", "above", "home", "documents"])
def test_a_folder_that_is_no_model_is_never_replaced(tmp_path, monkeypatch, where):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    places = {"here": Path("."), "above": Path(".."), "home": Path.home(), "documents": tmp_path / "work"}
    if where == "documents":
        monkeypatch.chdir(tmp_path)
    assert _refused(places[where], overwrite=True).code == "output.unsafe"


def test_too_little_disk_is_said_before_any_work(tmp_path):
    assert _refused(tmp_path / "model", needed_bytes=10**18).exit_code == ExitCode.RESOURCES


def test_a_read_only_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    # root may write anywhere, so the system's answer is what is pretended, not the folder's mode
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    assert _refused(tmp_path / "locked" / "model").code == "output.read-only"


def test_names_with_glob_characters_are_taken_literally(tmp_path):
    (tmp_path / ".m1.tmp-12345678").mkdir()
    check_output(tmp_path / "m[1]", overwrite=False)
    assert (tmp_path / ".m1.tmp-12345678").exists()


def test_a_full_disk_is_the_users_problem_not_a_bug(tmp_path):
    """`/dev/full` fails every write as a full disk does."""
    with pytest.raises(CompressError) as caught, disk_errors(tmp_path, saved="blocks"):
        Path("/dev/full").write_text("x" * 10_000)
    assert caught.value.code == "output.disk-full" and caught.value.exit_code == ExitCode.RESOURCES
