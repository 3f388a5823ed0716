"""Does to real processes what machines and people do: full disks, limits, signals, read-only places, two runs at once.

    python evals/faults.py --seed 0 --rows evals/results/faults.json
    python evals/faults.py --only "full disk" --rows evals/results/faults.json   # the other rows stay

After every fault: the exit code, a short text (never a traceback), an output folder that is absent or complete, and the
same command, given again without the fault, ends with what an undisturbed run leaves, bit for bit. Full disks are small
file systems in memory where this user may mount one, otherwise RLIMIT_FSIZE alone. Exit code 1 when one fails.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import click
from forked import Forked, ForkServer
from kills import MODEL, Command, Place, commands
from left_behind import differing, digests, watched

from llmcompress.errors import ExitCode
from llmcompress.evaluation.environment import machine, versions

COMPRESS = Command("compress gptq", ("compress", MODEL, "--preset", "tiny/gptq", "-o", "out"), "out")
SIGNALLED = ("compress gptq", "compress recover", "compress distill", "evaluate", "export")
SIGNALS: Mapping[str, tuple[tuple[signal.Signals, ...], int]] = {
    "SIGTERM": ((signal.SIGTERM,), ExitCode.TERMINATED),
    "SIGINT once": ((signal.SIGINT,), ExitCode.INTERRUPTED),
    "SIGINT twice": ((signal.SIGINT, signal.SIGINT), ExitCode.INTERRUPTED),
}
"""Signals that are sent one after the other, and the exit code."""
BETWEEN = 0.05
"""Seconds between two signals."""
AT_ONCE = 1.0
"""Seconds within which a command ends that was finished anyway; one that swallows a signal goes on for longer."""
ROOM = 24_000_000
"""Bytes of the small file system: enough for the run if nothing else fills it."""
LONGEST_FILE = 300_000
"""Bytes; the weights have more."""


@dataclass
class Row:
    """One fault."""

    fault: str
    command: str
    expected: list[int]
    """Exit codes."""
    exit_code: int = 0
    said: str = ""
    """The last lines on the screen."""
    seconds_to_the_end: float = 0.0
    """After the fault."""
    wrong: list[str] = field(default_factory=list)


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, help="Names of faults.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where to write the result.")
def main(seed: int, only: tuple[str, ...], rows: Path | None) -> None:
    """Inject, look, and give the command again."""
    draw, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as scratch, ForkServer({}) as server:
        bench = Bench(Place(Path(scratch)), server)
        for name, inject in faults(draw):
            if not only or name in only:
                for row in inject(bench):
                    found.append(row)
                    click.echo(f"{row.fault}, {row.command}: {'; '.join(row.wrong) or 'as it should'}", err=True)
    for row in found:
        row.said = row.said.replace(f"{scratch}/", "")
    if rows:
        typed = " ".join([f"python evals/faults.py --seed {seed}", *(f"--only {shlex.quote(name)}" for name in only)])
        _write(rows, found, typed=typed)
    click.echo(f"{sum(not row.wrong for row in found)} of {len(found)} faults end as they should")
    sys.exit(any(row.wrong for row in found))


def _write(file: Path, found: Sequence[Row], *, typed: str) -> None:
    """Rows in the place of earlier ones of the same faults; the others stay."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": [], "runs": []}
    measured = {(row.fault, row.command): asdict(row) for row in found}
    rows = {(row["fault"], row["command"]): row for row in before["rows"]} | measured
    run = {"command": typed, "versions": versions(), "machine": machine()}
    facts = {
        "faults": len(rows),
        "as_they_should": sum(not row["wrong"] for row in rows.values()),
        "runs": [*(each for each in before["runs"] if each["command"] != typed), run],
        "rows": list(rows.values()),
    }
    file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def faults(draw: random.Random) -> Iterator[tuple[str, Callable[[Bench], Iterator[Row]]]]:
    """Name → what is done."""
    for name in SIGNALS:
        yield name, partial(signalled, name=name, draw=draw)
    yield "file size limit", limited
    yield "full disk", full_disk
    yield "read-only output", read_only
    yield "two runs in one folder", twice


@dataclass
class Bench:
    """Runs commands, and knows what an undisturbed one leaves."""

    place: Place
    server: ForkServer
    _peaceful: dict[str, tuple[float, Mapping[str, str]]] = field(default_factory=dict)

    def peaceful(self, command: Command) -> tuple[float, Mapping[str, str]]:
        """Seconds and digests; run once."""
        if command.name not in self._peaceful:
            folder = self.place.prepared(command, "peace")
            began = time.monotonic()
            code, said = self.start(command, folder).ended()
            if code:
                raise SystemExit(f"{command.name} failed when nothing disturbed it:\n{said}")
            self._peaceful[command.name] = time.monotonic() - began, digests(folder / command.output)
        return self._peaceful[command.name]

    def start(self, command: Command, folder: Path, **limits: int) -> Forked:
        """The command, with a cache of its own."""
        cache = {"LLMCOMPRESS_CACHE": str(self.place.root / f"cache-{folder.name}")}
        return self.server.start(command.words, folder=folder, environment=cache, **limits)

    def finish(self, row: Row, command: Command, folder: Path) -> None:
        """Give the command again, and compare."""
        _, wanted = self.peaceful(command)
        output = folder / command.output
        if not output.is_dir():
            code, said = self.start(command, folder).ended()
            if code:
                row.wrong.append(f"given again: exit code {code}: {said.strip()[-300:]}")
        row.wrong += _differing(wanted, output)


def signalled(bench: Bench, *, name: str, draw: random.Random) -> Iterator[Row]:
    """At a random moment of every command."""
    signals, expected = SIGNALS[name]
    for command in commands():
        if command.name in SIGNALLED:
            seconds, wanted = bench.peaceful(command)
            row = Row(name, command.name, [int(expected)])
            folder = bench.place.prepared(command, name.replace(" ", "-"))
            with watched(folder / command.output, wanted, row.wrong):
                process = bench.start(command, folder)
                process.wait(draw.uniform(0.05, 0.8) * seconds)
                began = time.monotonic()
                for each in signals:
                    process.send_signal(each)
                    time.sleep(BETWEEN)
                process.ended()
                row.seconds_to_the_end = round(time.monotonic() - began, 2)
                if row.seconds_to_the_end < AT_ONCE:
                    row.expected.append(0)  # it was faster this time, and finished when the signal came
                _judge(row, process)
                bench.finish(row, command, folder)
            shutil.rmtree(folder)
            yield row


def limited(bench: Bench) -> Iterator[Row]:
    """No file may be longer than a part of the weights: the system refuses the write in the middle of it."""
    row = Row("file size limit", COMPRESS.name, [int(ExitCode.RESOURCES)])
    folder = bench.place.prepared(COMPRESS, "limited")
    _, wanted = bench.peaceful(COMPRESS)
    with watched(folder / COMPRESS.output, wanted, row.wrong):
        _judge(row, bench.start(COMPRESS, folder, longest_file=LONGEST_FILE))
        _no_output(row, folder)
        bench.finish(row, COMPRESS, folder)
    yield row


def full_disk(bench: Bench) -> Iterator[Row]:
    """A file system that is full from the beginning, and one that somebody else fills in the middle of the run."""
    for how in ("from the beginning", "in the middle"):
        row = Row(f"full disk {how}", COMPRESS.name, [int(ExitCode.RESOURCES)])
        folder = bench.place.prepared(COMPRESS, f"full-{how[:4]}")
        _, wanted = bench.peaceful(COMPRESS)
        with small_file_system(folder) as mounted:
            if not mounted:
                return
            filler = folder / "somebody-else"
            with watched(folder / COMPRESS.output, wanted, row.wrong):
                if how == "from the beginning":
                    _fill(filler)
                process = bench.start(COMPRESS, folder)
                if how == "in the middle":
                    _wait_for_blocks(folder, process)
                    _fill(filler)
                _judge(row, process)
                _no_output(row, folder)
                filler.unlink()
                bench.finish(row, COMPRESS, folder)
        yield row


def read_only(bench: Bench) -> Iterator[Row]:
    """A place where nothing can be written: said before any work."""
    row = Row("read-only output", COMPRESS.name, [int(ExitCode.USAGE)])
    folder = bench.place.prepared(COMPRESS, "read-only")
    with small_file_system(folder) as mounted:
        if mounted:
            _mount("-o", "remount,ro", str(folder))
        else:
            folder.chmod(0o500)
        began = time.monotonic()
        _judge(row, bench.start(COMPRESS, folder))
        row.seconds_to_the_end = round(time.monotonic() - began, 2)
        if any(folder.iterdir()):
            row.wrong.append(f"left {sorted(path.name for path in folder.iterdir())}")
    folder.chmod(0o700)
    yield row


def twice(bench: Bench) -> Iterator[Row]:
    """The second is refused and names the first, which ends as if it had been alone."""
    row = Row("two runs in one folder", COMPRESS.name, [int(ExitCode.USAGE)])
    folder = bench.place.prepared(COMPRESS, "twice")
    _, wanted = bench.peaceful(COMPRESS)
    with watched(folder / COMPRESS.output, wanted, row.wrong):
        first = bench.start(COMPRESS, folder)
        _wait_for_blocks(folder, first)
        first.send_signal(signal.SIGSTOP)  # it is in the middle of its work, however fast the machine is
        refusal = _judge(row, bench.start(COMPRESS, folder))
        first.send_signal(signal.SIGCONT)
        if str(first.pid) not in refusal:
            row.wrong.append(f"the first run's process {first.pid} is not named")
        code, said = first.ended()
        if code:
            row.wrong.append(f"the first run: exit code {code}: {said.strip()[-300:]}")
        row.wrong += _differing(wanted, folder / COMPRESS.output)
    yield row


def _judge(row: Row, process: Forked) -> str:
    """How it ends, and everything that it said."""
    row.exit_code, said = process.ended()
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    row.said = " ".join(lines[-4:])[-600:]
    if row.exit_code not in row.expected:
        row.wrong.append(f"exit code {row.exit_code}: {said.strip()[-600:]}")
    if "Traceback" in said:
        row.wrong.append("a traceback on the screen")
    return said


def _no_output(row: Row, folder: Path) -> None:
    if (folder / COMPRESS.output).exists():
        row.wrong.append("there is an output")


def _differing(wanted: Mapping[str, str], output: Path) -> list[str]:
    return [f"other: {name}" for name in differing(wanted, digests(output) if output.is_dir() else {})]


def _wait_for_blocks(folder: Path, process: Forked) -> None:
    """Until the first one is saved."""
    while not list(folder.glob("out.run/**/*.safetensors")) and process.poll() is None:
        time.sleep(0.01)


def _fill(file: Path) -> None:
    """Until nothing fits any more."""
    with file.open("wb", buffering=0) as stream:
        for size in (2**20, 2**12):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue


@contextmanager
def small_file_system(folder: Path) -> Iterator[bool]:
    """In memory; gives False where this user may not mount one."""
    mounted = _mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _mount(*words: str) -> bool:
    try:
        return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main()
