"""Kills commands at random moments, gives them again, and compares what they leave with an uninterrupted run.

    python evals/kills.py --count 40 --seed 0 --rows evals/results/kills.json

Each command runs once in peace; then it is killed (SIGKILL, its children too) after a random share of that time, up to
three times in a row, and at last runs to its end. A second process reads the output folder all the while: whatever
appears there must be complete. Weights, configs, tokenizer and recipe must be the same, bit for bit. Exit code 1 when
one differs, a command fails, or a reader saw part of a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from llmcompress.evaluation.environment import machine, versions

MODEL = "builtin:books-llama"
PASSES = (
    "gptq",
    "awq-gptq",
    "gsq",
    "mixed-precision",
    "rotation-learned",
    "sparsegpt-gptq",
    "depth-greedy",
    "width-gptq",
    "slicegpt",
    "svd-gptq",
    "progressive",
    "recover",
    "distill",
    "lottery",
    "early-exit",
    "kv-cache",
)
"""One preset of each family of passes."""
TIMED = {
    "llmcompress_report.json",
    "export_report.json",
    "report.html",
    "report.md",
    "report.json",
    "README.md",
    "llmcompress_files.json",
}
"""Files that tell when and how fast: only their presence is compared."""
MOST_KILLS = 3


@dataclass(frozen=True)
class Command:
    """A command line, and the folder that it makes."""

    name: str
    words: tuple[str, ...]
    output: str
    needs: tuple[str, ...] = ()
    """Folders that must be there before."""


@dataclass
class Row:
    """One command that was killed."""

    command: str
    kills: list[float] = field(default_factory=list)
    """Seconds after its start."""
    seconds_in_peace: float = 0.0
    seconds_of_last: float = 0.0
    same: bool = False
    partial: list[str] = field(default_factory=list)
    """What a reader saw that was not complete."""
    differing: list[str] = field(default_factory=list)


@click.command()
@click.option("--count", default=40, show_default=True, help="Commands that are killed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, help="Names of commands.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where to write the result.")
def main(count: int, seed: int, only: tuple[str, ...], rows: Path | None) -> None:
    """Run, kill, run again, compare."""
    chosen = [each for each in commands() if not only or each.name in only]
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        peaceful = {each.name: place.in_peace(each) for each in chosen}
        found = []
        for number in range(count):
            found.append(place.killed(chosen[number % len(chosen)], peaceful, draw, number))
            click.echo(f"{number + 1}/{count} {found[-1].command}: {'same' if found[-1].same else found[-1]}", err=True)
    bad = [row for row in found if not row.same or row.partial]
    facts = {
        "seed": seed,
        "commands": count,
        "kills": sum(len(row.kills) for row in found),
        "same": sum(row.same for row in found),
        "partial_folders_seen": sum(len(row.partial) for row in found),
        "rows": [asdict(row) for row in found],
        "versions": versions(),
        "machine": machine(),
    }
    if rows:
        rows.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{facts['same']} of {count} the same after {facts['kills']} kills, {len(bad)} faults")
    sys.exit(bool(bad))


def commands() -> Iterator[Command]:
    """What is killed."""
    for name in PASSES:
        words = ("compress", MODEL, "--preset", f"tiny/{name}", "-o", "out")
        yield Command(f"compress {name}", words, "out")
    base = ("--baseline", MODEL, "--perplexity", "builtin:evaluation", "--window", "128", "--max-windows", "24")
    yield Command("evaluate", ("evaluate", MODEL, *base, "-o", "report"), "report")
    export = ("export", "w4", "--to", "gguf", "-o", "gguf")
    yield Command("export", export, "gguf", needs=("w4",))


@dataclass(frozen=True)
class Place:
    """A scratch folder; every run has its own folder and its own cache in it."""

    root: Path

    def in_peace(self, command: Command) -> tuple[float, Mapping[str, str]]:
        """Seconds and digests of an uninterrupted run."""
        folder = self._prepared(command, "peace")
        began = time.monotonic()
        done = self._start(command, folder).communicate()
        seconds = time.monotonic() - began
        if not (folder / command.output).is_dir():
            raise SystemExit(f"{command.name} failed when nothing disturbed it:\n{done[1]}")
        return seconds, digests(folder / command.output)

    def killed(
        self,
        command: Command,
        peaceful: Mapping[str, tuple[float, Mapping[str, str]]],
        draw: random.Random,
        number: int,
    ) -> Row:
        """The same command, killed up to `MOST_KILLS` times."""
        seconds, wanted = peaceful[command.name]
        row = Row(command.name, seconds_in_peace=round(seconds, 2))
        folder = self._prepared(command, f"killed-{number}")
        with watched(folder / command.output, wanted, row.partial):
            for _ in range(draw.randint(1, MOST_KILLS)):
                process, after = self._start(command, folder), draw.uniform(0, seconds)
                try:
                    process.communicate(timeout=after)
                    break  # it was faster this time: there is nothing left to kill
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    row.kills.append(round(after, 2))
            began = time.monotonic()
            if not (folder / command.output).is_dir():
                last = self._start(command, folder)
                _, said = last.communicate()
                if last.returncode:
                    row.differing.append(f"exit code {last.returncode}: {said.strip()[-300:]}")
            row.seconds_of_last = round(time.monotonic() - began, 2)
        left = digests(folder / command.output) if (folder / command.output).is_dir() else {}
        row.differing += sorted(name for name in wanted.keys() | left.keys() if wanted.get(name) != left.get(name))
        row.same = not row.differing
        shutil.rmtree(folder)
        return row

    def _prepared(self, command: Command, name: str) -> Path:
        folder = self.root / f"{command.name.replace(' ', '-')}-{name}"
        folder.mkdir()
        for needed in command.needs:
            shutil.copytree(self._made(needed), folder / needed)
        return folder

    def _made(self, needed: str) -> Path:
        """A compressed folder for commands that read one; made once."""
        made = self.root / "needed" / needed
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            scheme = ("--set", "passes.gptq.scheme=int4_g32", "--set", "evaluate={}")
            words = ("compress", MODEL, "--preset", "tiny/gptq", *scheme, "-o", needed)
            self._start(Command(needed, words, needed), made.parent).communicate()
        return made

    def _start(self, command: Command, folder: Path) -> subprocess.Popen[str]:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LLMCOMPRESS_CACHE": str(folder / "cache")}
        return subprocess.Popen(
            [sys.executable, "-m", "llmcompress", *command.words],
            cwd=folder,
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def digests(folder: Path) -> dict[str, str]:
    """File → sha256; of files that tell the time only that they are there."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: "there" if path.name in TIMED else hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
    }


@contextmanager
def watched(folder: Path, wanted: Mapping[str, str], partial: list[str]) -> Iterator[None]:
    """A reader that looks all the time: the folder is not there, or it has every file."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            try:
                there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            except OSError:
                continue
            if there and there != set(wanted):
                partial.append(f"{len(there)} of {len(wanted)} files")

    reader = threading.Thread(target=look)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


if __name__ == "__main__":
    main()
