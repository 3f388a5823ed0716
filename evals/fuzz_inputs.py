"""Damages the files that users bring, runs commands on them, and counts how each ends: exit code 1 is a bug of ours.

python evals/fuzz_inputs.py --count 2000 --seed 1 --rows evals/results/fuzz-inputs.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from llmcompress.cli.main import main as llmcompress
from llmcompress.errors import ExitCode
from llmcompress.evaluation.environment import versions

_RECIPE = {
    "seed": 0,
    "calibration": {"samples": 2, "tokens": 16, "source": "builtin:calibration"},
    "passes": [{"gptq": {"scheme": "int4_g16", "damping": 0.01, "sites": ["*"], "overrides": {"*.q_proj": {}}}}],
    "evaluate": {"perplexity": [{"source": "builtin:evaluation", "max_windows": 1}]},
    "save": {"format": "auto", "max_shard_size": "5GB"},
}
CHEAPEST = "passes: [rtn: {scheme: int4_g16}]\nevaluate: {}\n"
_TEXT = "text.jsonl"

_DRY_RUN = ("compress", "dense", "--recipe", "cheapest.yaml", "--dry-run")
_COMPRESS = ("compress", "dense", "--recipe", "cheapest.yaml", "-o", "out", "--overwrite", "--fresh")
_EVALUATE = ("evaluate", "dense", "--perplexity", _TEXT, "--max-windows", "1")

DAMAGED: Mapping[str, Sequence[Sequence[str]]] = {
    "dense/config.json": (("inspect", "dense"), _DRY_RUN, _COMPRESS, _EVALUATE),
    "dense/generation_config.json": (_DRY_RUN, _COMPRESS),
    "dense/model.safetensors.index.json": (_DRY_RUN, _COMPRESS, ("footprint", "dense")),
    "dense/tokenizer_config.json": (_DRY_RUN, _EVALUATE),
    "dense/tokenizer.json": (_DRY_RUN, _EVALUATE),
    "codes/config.json": (("inspect", "codes"), ("footprint", "codes"), ("evaluate", "codes", *_EVALUATE[2:])),
    "codes/llmcompress_report.json": (("inspect", "codes"), ("footprint", "codes")),
    "manifest/config.json": (("inspect", "manifest"), ("footprint", "manifest")),
    "codes/model.safetensors": (("footprint", "codes"), ("evaluate", "codes", *_EVALUATE[2:])),
    "single/model.safetensors": tuple(
        tuple("single" if word == "dense" else word for word in each) for each in (_DRY_RUN, _COMPRESS)
    ),
    "gguf/model.gguf": (("inspect", "gguf"), ("evaluate", "gguf", *_EVALUATE[2:])),
    "recipe.yaml": (("compress", "dense", "--recipe", "recipe.yaml", "--dry-run"),),
    _TEXT: (_EVALUATE,),
}
"""File → the commands that read it."""
PLAIN_MODEL = tuple(file for file in DAMAGED if file.startswith("dense/"))

SECONDS_FOR_A_COMMAND = 60

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 3.5, -0.5, 1e300, float("nan"), float("inf"), 10_000_000, 2**31, 2**63, 10**30),
    *("", "text", "0", "../x", "a" * 300, "\x00", "Ünïcödé", "float16", [], [1], ["a", None], {}, {"a": 1}),
    *({"rope_type": "yarn"}, {"factor": 0}, [[]], [{}]),
)


class Mutation(NamedTuple):
    """One damaged file."""

    file: str
    what: str
    content: bytes


def mutations(folder: Path, *, count: int, seed: int, files: Sequence[str] = tuple(DAMAGED)) -> Iterator[Mutation]:
    """So many mutations of the files, the same for the same seed."""
    choose = random.Random(seed)
    for _ in range(count):
        file = choose.choice((*files, files[0]))  # config.json twice as often
        yield _mutated(file, (folder / file).read_bytes(), choose)


def _mutated(file: str, content: bytes, choose: random.Random) -> Mutation:
    if choose.random() < 0.15 or file.endswith(".gguf"):
        return _torn(file, content, choose)
    if file.endswith(".safetensors"):
        return _header_mutated(file, content, choose)
    lines = content.splitlines(keepends=True) if file.endswith(".jsonl") else [content]
    at = choose.randrange(len(lines))
    data = json.loads(lines[at])
    holder = data
    path: list[Any] = []
    while isinstance(holder, dict | list) and holder:
        key = choose.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        path.append(key)
        if not isinstance(holder[key], dict | list) or not holder[key] or choose.random() < 0.4:
            break
        holder = holder[key]
    if not path:
        return _torn(file, content, choose)
    changes: dict[str, Callable[[], None]] = {
        "removed": lambda: holder.pop(path[-1]),
        "replaced": lambda: holder.__setitem__(path[-1], copy.deepcopy(choose.choice(_VALUES))),
        "scaled": lambda: holder.__setitem__(path[-1], _scaled(holder[path[-1]], choose)),
    }
    name = choose.choices(tuple(changes), weights=(1, 6, 3))[0]
    changes[name]()
    value = "" if name == "removed" else f": {holder[path[-1]]!r:.60}"
    lines[at] = json.dumps(data).encode() + b"\n" * (len(lines) > 1)
    return Mutation(file, f"{'.'.join(map(str, path))} {name}{value}", b"".join(lines))


def _header_mutated(file: str, content: bytes, choose: random.Random) -> Mutation:
    """A safetensors file: 8 bytes of length, a header in JSON, numbers."""
    length = int.from_bytes(content[:8], "little")
    inside = _mutated(f"{file}.json", content[8 : 8 + length], choose)
    told = len(inside.content) if choose.random() < 0.9 else choose.choice((0, 2**40, 2**63, length + 10**9))
    return Mutation(file, f"header: {inside.what}", told.to_bytes(8, "little") + inside.content + content[8 + length :])


def _scaled(value: Any, choose: random.Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [value] if choose.random() < 0.5 else str(value)
    return choose.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value), value * 10**6))


def _torn(file: str, content: bytes, choose: random.Random) -> Mutation:
    # what says how the rest is read stands first
    at = choose.randrange(len(content) if choose.random() < 0.5 else min(len(content), 4096))
    torn = {
        "cut": content[:at],
        "empty": b"",
        "an object": b"{}",
        "a list": b"[]",
        "a number": b"1",
        "text": b'"x"',
        "null": b"null",
        "not UTF-8": content[:at] + b"\xff\xfe" + content[at:],
        "a byte changed": content[:at] + bytes([choose.randrange(256)]) + content[at + 1 :],
        "deeply nested": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "a long number": b'{"a":' + b"9" * 5000 + b"}",
    }
    what = choose.choice(sorted(torn))
    return Mutation(file, what, torn[what])


def write_inputs(folder: Path) -> None:
    """A dense model, two that we compressed, recipes and a text, all tiny."""
    from tests.tiny_folder import write_tiny_llama

    write_tiny_llama(folder / "dense", shard="30KB")
    write_tiny_llama(folder / "single", intermediate_size=64)
    write_recipes(folder)
    rows = [{"text": f"the quick brown fox {number} jumps over the lazy dog " * 8} for number in range(12)]
    (folder / _TEXT).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_recipes(folder: Path) -> None:
    """One with many options, to be damaged, and the cheapest."""
    (folder / "recipe.yaml").write_text(json.dumps(_RECIPE))  # JSON is YAML
    (folder / "cheapest.yaml").write_text(CHEAPEST)


def write_compressed(folder: Path) -> None:
    """What two formats make of the dense model, and a GGUF file."""
    ended = run(folder, ("export", "single", "--to", "gguf", "-o", "gguf", "--no-run"))
    assert ended.exit_code == 0, ended
    for name, form in (("codes", "auto"), ("manifest", "llmcompress")):
        ended = run(
            folder, ("compress", "dense", "--recipe", "cheapest.yaml", "-o", name, "--set", f"save.format={form}")
        )
        assert ended.exit_code == 0, ended


class Ended(NamedTuple):
    """How a command ended."""

    exit_code: int
    how: str
    """The code of a refusal; for a bug the exception with our line that let it pass."""


def run(folder: Path, command: Sequence[str]) -> Ended:
    """One command in this process, as if its words had been typed in the folder."""
    before, shown = Path.cwd(), io.StringIO()
    handler = signal.signal(signal.SIGALRM, _too_long)
    os.chdir(folder)
    signal.alarm(SECONDS_FOR_A_COMMAND)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
            llmcompress([*command, "--json"])
    except SystemExit as end:
        code = int(end.code or 0)
        if code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):  # the signal was for this program, not for the command
            raise KeyboardInterrupt from end
    except BaseException as problem:  # what the command line lets through shows a traceback and exits with 1
        return Ended(int(ExitCode.BUG), f"{type(problem).__name__}: {problem!s:.100}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)
    return Ended(code, "fine" if code == 0 else _told(json.loads(shown.getvalue())["error"]))


def _told(error: Mapping[str, Any]) -> str:
    if error["code"] != "bug":
        return str(error["code"])
    log = Path(error["where"])
    ours = re.findall(r'File ".*llmcompress/(\S+\.py)", line (\d+)', log.read_text())
    log.unlink()
    return f"{error['what']:.110} at {':'.join(ours[-1]) if ours else '?'}"


def _too_long(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"longer than {SECONDS_FOR_A_COMMAND} s")


def damaged(folder: Path, mutation: Mutation, commands: Sequence[Sequence[str]]) -> list[Ended]:
    """How the commands end with this file damaged; it is afterwards as it was."""
    file = folder / mutation.file
    before = file.read_bytes()
    file.write_bytes(mutation.content)
    try:
        return [run(folder, command) for command in commands]
    finally:
        file.write_bytes(before)


def main() -> int:
    """Prints every way to end with one mutation that shows it; 1 where any exit code is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many, however many files are left")
    parser.add_argument("--rows", type=Path, help="add the counts to those that are there, as JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    tempfile.tempdir = str(folder)
    codes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    ways: Counter[tuple[int, str]] = Counter()
    examples: dict[tuple[int, str], str] = {}
    began, began_at, files = time.process_time(), time.monotonic(), 0
    try:
        write_inputs(folder)
        write_compressed(folder)
        for mutation in mutations(folder, count=options.count, seed=options.seed):
            if options.minutes is not None and time.monotonic() > began_at + 60 * options.minutes:
                break
            files += 1
            commands = DAMAGED[mutation.file]
            for command, ended in zip(commands, damaged(folder, mutation, commands), strict=True):
                dry = " --dry-run" if "--dry-run" in command else ""
                codes[f"{command[0]}{dry}"][str(ended.exit_code)] += 1
                ways[ended] += 1
                if ended not in examples:
                    examples[ended] = f"{' '.join(command)} with {mutation.file}: {mutation.what}"
                    if ended.exit_code == ExitCode.BUG:
                        print(f"BUG {ended.how}: {examples[ended]}", flush=True)
    finally:
        shutil.rmtree(folder)
    for (code, how), times in sorted(ways.items(), key=lambda item: (item[0][0], -item[1])):
        print(f"{times:5d}  exit {code}  {how:40s}  {examples[code, how]}")
    bugs = sum(each[str(int(ExitCode.BUG))] for each in codes.values())
    print(f"{files} damaged files, {ways.total()} commands, {bugs} exits with 1")
    if options.rows:
        run = {
            "command": f"python evals/fuzz_inputs.py --count {files} --seed {options.seed}",
            "versions": versions(),
            "damaged_files": files,
            "cpu_seconds": round(time.process_time() - began),
            "seconds": round(time.monotonic() - began_at),
            "exit_codes_by_command": {name: dict(sorted(codes[name].items())) for name in sorted(codes)},
            "refusals": {how: times for (code, how), times in ways.most_common() if code},
        }
        _add(options.rows, run)
    return 1 if bugs else 0


def _add(file: Path, run: Mapping[str, Any]) -> None:
    """A run beside the earlier ones, in the place of one with the same seed; and what they are together."""
    before = json.loads(file.read_text(encoding="utf-8")).get("runs", []) if file.is_file() else []
    seed = run["command"].rpartition(" ")[2]
    runs = [*(each for each in before if each["command"].rpartition(" ")[2] != seed), run]
    codes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for each in runs:
        for name, counts in each["exit_codes_by_command"].items():
            codes[name].update(counts)
    together = {key: sum(each[key] for each in runs) for key in ("damaged_files", "cpu_seconds", "seconds")}
    bugs = sum(each[str(int(ExitCode.BUG))] for each in codes.values())
    totals = {name: dict(sorted(codes[name].items())) for name in sorted(codes)}
    facts = {**together, "commands": sum(each.total() for each in codes.values()), "bugs": bugs}
    rows = {**facts, "exit_codes_by_command": totals, "runs": runs}
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
