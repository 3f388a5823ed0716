"""The run folder: blocks come back bit for bit, torn journals heal, one process at a time, no other settings."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress.errors import CompressError, ExitCode
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.passes.apply import meta_copy
from llmcompress.records.rows import SiteReport
from llmcompress.run import Run
from llmcompress.storage.atomic import replacing
from llmcompress.storage.folder import check_output, staging_folder
from llmcompress.storage.lock import ProcessLock
from llmcompress.storage.ownership import begin_run_folder, mark_output
from tests.exporters.quantized import quantized_model
from tests.families import tiny_model, tiny_tokens

SETTINGS = {"recipe": "abc", "model": "123"}
ROWS = [SiteReport(site="a.b", algorithm="gptq", scheme="int4_g32", error=0.1 + 0.2, tokens=7)]
SCHEMES = ["int4_g32", "int3_g32_asym", "int8_channel_a8token", "int8_channel_a8tensor", "int2_channel"]


def _open(output: Path, *, fresh: bool = False, **changed: str) -> Run:
    return Run.open(output, fingerprint={**SETTINGS, **changed}, lock_text="passes: [rtn]\n", fresh=fresh)


def _save(run: Run, index: int, rows: list[SiteReport]) -> None:
    run.save_block(0, index, _block(index), _block(0), rows)


def _block(value: float) -> nn.Module:
    block = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    nn.init.constant_(block[0].weight, value)
    return block


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mixtral"])
def test_blocks_come_back_bit_for_bit(tmp_path, family):
    model, again = quantized_model(family, SCHEMES), tiny_model(family, seed=1)
    paths = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and name.count(".") <= 2]
    blocks, fresh_blocks = (list(m.get_submodule(paths[0])) for m in (model, again))
    with _open(tmp_path / "out") as run:
        for index, block in enumerate(blocks):
            run.save_block(0, index, block, meta_copy(fresh_blocks[index]), ROWS)
    with _open(tmp_path / "out") as run:
        assert run.finished_blocks(0) == list(range(len(blocks)))
        for index, block in enumerate(fresh_blocks):
            assert run.restore_block(0, index, block) == ROWS
    for block, back in zip(blocks, fresh_blocks, strict=True):
        assert not back.training
        state, found = block.state_dict(), back.state_dict()
        assert state.keys() == found.keys()
        assert all(_same_bits(tensor, found[name]) for name, tensor in state.items())
        assert [part.spec() for part in block.modules() if isinstance(part, QuantLinear)] == [
            part.spec() for part in back.modules() if isinstance(part, QuantLinear)
        ]
    outside = {name: part for name, part in model.state_dict().items() if not name.startswith(paths[0])}
    again.load_state_dict({**again.state_dict(), **outside})
    with torch.no_grad():
        assert torch.equal(model(tiny_tokens(family)).logits, again(tiny_tokens(family)).logits)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.contiguous().numpy()) == bytes(b.contiguous().numpy())


def test_a_damaged_or_lost_block_ends_what_is_finished(tmp_path):
    with _open(tmp_path / "out") as run:
        for index in range(4):
            _save(run, index, [])
        folder = run.folder
    damaged = folder / "work" / "00-002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with _open(tmp_path / "out") as run:
        assert run.finished_blocks(0) == [0, 1]
        _save(run, 2, ROWS)
        assert run.finished_blocks(0) == [0, 1, 2, 3]
    (folder / "work" / "00-000.safetensors").unlink()
    with _open(tmp_path / "out") as run:
        assert run.finished_blocks(0) == []


@pytest.mark.parametrize("tail", [b'{"block": 2, "sha', b'{"block": 2}', b"\x00\x00\x00", b'{"torn\n{"block": 3}\n'])
def test_a_torn_journal_is_cut_and_goes_on(tmp_path, tail):
    with _open(tmp_path / "out") as run:
        for index in range(2):
            _save(run, index, ROWS)
        journal = run.folder / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    with _open(tmp_path / "out") as run:
        assert journal.read_bytes() == whole and run.finished_blocks(0) == [0, 1]
        _save(run, 2, ROWS)
    with _open(tmp_path / "out") as run:
        assert run.finished_blocks(0) == [0, 1, 2]
        assert run.restore_block(0, 2, _block(9)) == ROWS
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_block_without_its_journal_line_is_not_finished(tmp_path):
    with _open(tmp_path / "out") as run:
        _save(run, 0, [])
        (run.folder / "journal.jsonl").unlink()
    with _open(tmp_path / "out") as run:
        assert run.finished_blocks(0) == []


def test_other_settings_are_refused_with_the_difference_and_a_way_out(tmp_path):
    with _open(tmp_path / "out") as run:
        _save(run, 0, [])
    with pytest.raises(CompressError) as caught:
        _open(tmp_path / "out", recipe="other")
    error = caught.value
    assert error.exit_code == ExitCode.USAGE and "recipe: abc → other" in error.where and "`fresh=True`" in error.fix
    assert "model" not in error.where.split("(")[1]
    with _open(tmp_path / "out") as run:
        assert run.finished_blocks(0) == [0], "the refusal changed nothing"
    with _open(tmp_path / "out", recipe="other", fresh=True) as run:
        assert run.finished_blocks(0) == []
    with _open(tmp_path / "out", recipe="other"):
        pass


def test_the_recipe_lies_beside_as_it_was_given(tmp_path):
    with _open(tmp_path / "out") as run:
        run.log("started", blocks=3)
        assert (run.folder / "lock.yaml").read_text() == "passes: [rtn]\n"
        assert json.loads((run.folder / "log.jsonl").read_text())["blocks"] == 3


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    began = time.monotonic()
    with _open(tmp_path / "out"), pytest.raises(CompressError) as caught:
        _open(tmp_path / "out")
    assert caught.value.code == "run.locked" and time.monotonic() - began < 5, "it does not wait"
    assert f"process {os.getpid()} on {socket.gethostname()}, for 0 minutes, is working on this run" in str(
        caught.value
    )
    with _open(tmp_path / "out"):
        pass


def test_a_refused_start_gives_the_lock_back(tmp_path):
    with _open(tmp_path / "out") as run:
        _save(run, 0, [])
    for _ in range(2):
        with pytest.raises(CompressError, match=r"run\.other"):
            _open(tmp_path / "out", recipe="other")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, our_python):
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom llmcompress.run import Run\n"
        f"Run.open(Path(sys.argv[1]), fingerprint={SETTINGS!r}, lock_text='', fresh=False)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = our_python.run(program, tmp_path / "out")
    assert done.returncode == -9 and (tmp_path / "out.run" / "process.json").exists()
    with _open(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    "text",
    [f'{{"pid": {os.getpid()}, "host": "here", "began": 1.0}}', "", "not json", "[]"],
    ids=["used again", "empty", "must contain a JSON object", "a list"],
)
def test_what_a_killed_process_left_written_locks_nobody_out_and_breaks_no_message(tmp_path, text):
    """The first is a process id that was used again."""
    run = tmp_path / "out.run"
    begin_run_folder(run)
    (run / "lock").touch()
    (run / "process.json").write_text(text)
    with _open(tmp_path / "out"):
        (run / "process.json").write_text(text)
        with pytest.raises(CompressError, match="is working on this run"):
            _open(tmp_path / "out")
    assert not ProcessLock(run).is_held()


def test_a_finished_run_leaves_nothing(tmp_path):
    with _open(tmp_path / "out") as run:
        _save(run, 0, [])
        run.discard()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_blocks_before_it(tmp_path, our_python):
    """A limit on file size stands for a full disk: the write fails halfway."""
    program = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom torch import nn\n"
        "from llmcompress.run import Run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"run = Run.open(Path(sys.argv[1]), fingerprint={SETTINGS!r}, lock_text='', fresh=False)\n"
        "run.save_block(0, 0, nn.Linear(3, 3), nn.Linear(3, 3), [])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    run.save_block(0, 1, nn.Linear(300, 300), nn.Linear(300, 300), [])\n"
        "except ValueError as error:\n    print(error.code, int(error.exit_code), error.saved)"
    )
    done = our_python.run(program, tmp_path / "out")
    assert "output.disk-full 4 1 finished blocks in" in done.stdout, done.stderr
    with Run.open(tmp_path / "out", fingerprint=SETTINGS, lock_text="", fresh=False) as run:
        assert run.finished_blocks(0) == [0]


def test_what_a_living_run_is_writing_is_not_swept_away(tmp_path):
    output = tmp_path / "out"
    with Run.open(output, fingerprint=SETTINGS, lock_text="", fresh=False), staging_folder(output) as staging:
        check_output(output, overwrite=False)
        assert staging.is_dir()
    left = tmp_path / ".out.tmp-12345678"
    left.mkdir()
    mark_output(left)
    check_output(output, overwrite=False)
    assert not left.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, done = tmp_path / "a.json", []
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, real=real, name=name: (done.append(name), real(*given))[1])
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == path.parent
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert done == ["fsync", "replace", "fsync"], "the content before its name, the name before it counts"


@pytest.mark.parametrize("torn", ['{"recipe": "a', "", "[]"])
def test_a_torn_fingerprint_is_refused_with_the_way_out_and_fresh_takes_it(tmp_path, torn):
    with _open(tmp_path / "out") as run:
        run.save_block(0, 0, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), [])
    (tmp_path / "out.run" / "fingerprint.json").write_text(torn)
    with pytest.raises(CompressError) as caught:
        _open(tmp_path / "out")
    assert caught.value.code == "run.damaged" and "`fresh=True`" in caught.value.fix
    assert caught.value.exit_code is ExitCode.USAGE
    with _open(tmp_path / "out", fresh=True) as run:
        assert run.finished_blocks(0) == []
