"""Kills commands at random moments, gives them again, and compares what they leave with an uninterrupted run.

    python evals/kills.py --count 40 --seed 0 --rows evals/results/kills.json
    python evals/kills.py --count 12 --seed 0 --only push --rows evals/results/kills.json   # the other rows stay

Each command runs once in peace; then it is killed (SIGKILL, its children too) after a random share of the CPU time that
this took, up to three times in a row, and at last runs to its end. A second process reads the output folder all the
while: whatever appears there must be complete. Weights, configs, tokenizer and recipe must be the same, bit for bit; of
a search every plan that was judged and its loss, the front, recipes and models. Pushes are killed at requests of the
Hub (`killed_pushes.py`). Exit code 1 when one differs, a command fails, or a reader saw part of a folder.
"""

from __future__ import annotations

import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from kill_rows import Row, write_rows
from killed_pushes import PUSH, PushPlace, push_place
from left_behind import differing, digests, digests_of_study, watched

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
MAKING = {
    "w4": (
        *("compress", MODEL, "--preset", "tiny/gptq", "--set", "passes.gptq.scheme=int4_g32"),
        *("--set", "evaluate={}", "-o", "w4"),
    ),
    "gguf": ("export", "w4", "--to", "gguf", "-o", "gguf"),
}
"""Folders that commands need, and how they are made."""
SEARCH = (
    *("search", MODEL, "--space", "joint", "--fit", "0.3x", "--set", "calibration.samples=4"),
    *("--set", "optimizer.evopress.trials=8", "--set", "judge.stages=[256,512]"),
    *("--set", "evaluate.perplexity=[{source: builtin:evaluation, window: 128, max_windows: 2}]", "-o", "study"),
)
MOST_KILLS = 3


@dataclass(frozen=True)
class Command:
    """A command line, and the folder that it makes."""

    name: str
    words: tuple[str, ...]
    output: str
    needs: tuple[str, ...] = ()
    """Folders that must be there before."""
    parts: str = ""
    """Of a search, whose folder grows while it works: the folder in it whose numbered folders appear at once."""

    def left(self, folder: Path) -> Mapping[str, str]:
        """Digests of what is there of its output."""
        output = folder / self.output
        if self.parts:
            return digests_of_study(output)
        return digests(output) if output.is_dir() else {}


@click.command()
@click.option("--count", default=40, show_default=True, help="Commands that are killed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, help="Names of commands.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where to write the result.")
def main(count: int, seed: int, only: tuple[str, ...], rows: Path | None) -> None:
    """Run, kill, run again, compare."""
    chosen = [each for each in commands() if not only or each.name in only]
    draw = random.Random(seed)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        peaceful = {each.name: place.in_peace(each) for each in chosen}
        names = [each.name for each in chosen]
        with pushing(place, PUSH in only or not only) as pushes:
            names += [PUSH] if pushes else []
            for number in range(count):
                name = names[number % len(names)]
                if pushes is not None and name == PUSH:
                    found.append(pushes.killed(draw))
                else:
                    command = next(each for each in chosen if each.name == name)
                    found.append(place.killed(command, peaceful, draw, number))
                said = "same" if found[-1].same else found[-1]
                click.echo(f"{number + 1}/{count} {name}: {said}", err=True)
    bad = [row for row in found if not row.same or row.partial]
    if rows:
        words = [f"--only {shlex.quote(name)}" for name in only]
        typed = " ".join(["python evals/kills.py", f"--count {count} --seed {seed}", *words])
        write_rows(rows, found, measured=names, typed=typed)
    kills = sum(len(row.kills) for row in found)
    click.echo(f"{sum(row.same for row in found)} of {count} the same after {kills} kills, {len(bad)} faults")
    sys.exit(bool(bad))


@contextmanager
def pushing(place: Place, wanted: bool) -> Iterator[PushPlace | None]:
    """Where pushes are killed, if any are."""
    if not wanted:
        yield None
        return
    made = place.made("w4"), place.made("gguf")
    with push_place(*made, place.root) as found:
        yield found


def commands() -> Iterator[Command]:
    """What is killed."""
    for name in PASSES:
        words = ("compress", MODEL, "--preset", f"tiny/{name}", "-o", "out")
        yield Command(f"compress {name}", words, "out")
    base = ("--baseline", MODEL, "--perplexity", "builtin:evaluation", "--window", "128", "--max-windows", "24")
    yield Command("evaluate", ("evaluate", MODEL, *base, "-o", "report"), "report")
    yield Command("export", MAKING["gguf"], "gguf", needs=("w4",))
    yield Command("search", SEARCH, "study", parts="models")


@dataclass(frozen=True)
class Place:
    """A scratch folder; every run has its own folder and its own cache in it."""

    root: Path

    def in_peace(self, command: Command) -> tuple[float, Mapping[str, str]]:
        """CPU seconds and digests of an uninterrupted run."""
        folder = self.prepared(command, "peace")
        began = children_cpu_seconds()
        done = self.start(command, folder).communicate()
        seconds = children_cpu_seconds() - began
        if not (folder / command.output).is_dir():
            raise SystemExit(f"{command.name} failed when nothing disturbed it:\n{done[1]}")
        return seconds, command.left(folder)

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
        folder = self.prepared(command, f"killed-{number}")
        with watched(folder / command.output, names_of(wanted, command), row.partial, parts=command.parts):
            is_over = False
            for _ in range(draw.randint(1, MOST_KILLS)):
                process, after = self.start(command, folder), draw.uniform(0, seconds)
                if has_ended(process, after):
                    is_over = process.returncode == 0  # it took less this time: there is nothing left to kill
                    break
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                row.kills.append(round(after, 2))
            began = time.monotonic()
            if not (is_over or ((folder / command.output).is_dir() and not command.parts)):
                last = self.start(command, folder)
                _, said = last.communicate()
                if last.returncode:
                    row.differing.append(f"exit code {last.returncode}: {said.strip()[-300:]}")
            row.seconds_of_last = round(time.monotonic() - began, 2)
        row.differing += differing(wanted, command.left(folder))
        row.same = not row.differing
        shutil.rmtree(folder)
        return row

    def prepared(self, command: Command, name: str) -> Path:
        """A folder with what the command needs."""
        folder = self.root / f"{command.name.replace(' ', '-')}-{name}"
        folder.mkdir()
        for needed in command.needs:
            shutil.copytree(self.made(needed), folder / needed)
        return folder

    def made(self, needed: str) -> Path:
        """A compressed folder for commands that read one, or its export; made once."""
        folder = self.root / "needed"
        folder.mkdir(exist_ok=True)
        words = MAKING[needed]
        if not (folder / needed).exists():
            if words[1] == "w4":
                self.made("w4")
            _, said = self.start(Command(needed, words, needed), folder).communicate()
            if not (folder / needed).exists():
                raise SystemExit(f"{needed} was not made:\n{said}")
        return folder / needed

    def start(self, command: Command, folder: Path) -> subprocess.Popen[str]:
        """The command in a process group of its own."""
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


def children_cpu_seconds() -> float:
    """Of everything that was started and has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def has_ended(process: subprocess.Popen[str], seconds: float) -> bool:
    """Waits until it has taken so many CPU seconds, its children's included; whether it ended before."""
    while process.poll() is None:
        try:
            tree = psutil.Process(process.pid)
            times = [each.cpu_times() for each in (tree, *tree.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue
        if sum(each.user + each.system for each in times) >= seconds:
            return False
        time.sleep(0.02)
    return True


def names_of(wanted: Mapping[str, str], command: Command) -> set[str]:
    """Files that a reader must see together."""
    if not command.parts:
        return set(wanted)
    return {name.split("/", 2)[2] for name in wanted if name.startswith(f"{command.parts}/")}


if __name__ == "__main__":
    main()
