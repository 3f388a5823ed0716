"""Plants plausible bugs, one at a time, in a copy of the project and runs the tests that ought to notice.

    python evals/mutants.py                 all of evals/mutants.yaml; results → evals/results/mutants.json
    python evals/mutants.py --only gptq-act-order-ascending smoothquant-exponents-swapped
    python evals/mutants.py --texts         only check that every bug can still be planted

A bug that no test notices survives: the exit code is 1 when more than 5 % do, or when a text is not found any more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).resolve().parent.parent
BUGS, RESULTS = ROOT / "evals" / "mutants.yaml", ROOT / "evals" / "results" / "mutants.json"
COPIED = ("llmcompress", "tests", "configs", "docs", "evals", "scripts", "README.md", "pyproject.toml")
ALLOWED_SURVIVORS = 0.05
_SECONDS = 900


@dataclass(frozen=True)
class Bug:
    """One planted bug: `old` becomes `new` in `file`; `tests` (pytest's `-k only`) ought to fail then."""

    id: str
    file: str
    old: str
    new: str = ""
    tests: tuple[str, ...] = ()
    only: str | None = None


def main() -> int:
    """Plant every bug asked for, two at a time, and report what survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="ids of bugs")
    parser.add_argument("--texts", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    bugs = [each for each in read_bugs() if not given.only or each.id in given.only]
    if stale := [f"{each.id}: {count} places in {each.file}" for each in bugs if (count := places(each)) != 1]:
        print("each of these must be in exactly one place:", *stale, sep="\n  ")
        return 1
    if given.texts:
        return 0
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() and given.only else {}
    results = {each.id: before[each.id] for each in read_bugs() if each.id in before}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(given.jobs):
            copies.put(copy_of_project(Path(scratch) / str(number)))
        for bug, (verdict, seconds) in zip(bugs, pool.map(lambda bug: planted(bug, copies), bugs), strict=True):
            print(f"{verdict:9} {seconds:5.0f} s  {bug.id}", file=sys.stderr, flush=True)
            results[bug.id] = verdict
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    survived = sorted(name for name, verdict in results.items() if verdict != "killed")
    print(f"{len(results) - len(survived)} of {len(results)} bugs were noticed", *survived, sep="\n  ")
    return int(len(survived) > ALLOWED_SURVIVORS * len(results))


def read_bugs() -> list[Bug]:
    """The bugs of evals/mutants.yaml."""
    return [Bug(**{**each, "tests": tuple(each["tests"])}) for each in yaml.safe_load(BUGS.read_text())]


def places(bug: Bug, root: Path = ROOT) -> int:
    """How often the text that a bug replaces stands in its file."""
    path = root / bug.file
    return path.read_text(encoding="utf-8").count(bug.old) if path.is_file() else 0


def copy_of_project(folder: Path) -> Path:
    """What tests need, without caches."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def planted(bug: Bug, copies: SimpleQueue[Path]) -> tuple[str, float]:
    """`killed`, `survived`, or why neither can be said; and the seconds that took."""
    folder, began = copies.get(), time.monotonic()
    path = folder / bug.file
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(before.replace(bug.old, bug.new), encoding="utf-8")
        return _verdict(bug, folder), time.monotonic() - began
    finally:
        path.write_text(before, encoding="utf-8")
        copies.put(folder)


def _verdict(bug: Bug, folder: Path) -> str:
    # the selection of families depends on the commit, and whether a bug is noticed must not
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "--families", "all", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *bug.tests, *(["-k", bug.only] if bug.only else [])],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "killed"  # an endless loop is noticed, too
    return {0: "survived", 1: "killed"}.get(done.returncode, f"pytest exit code {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
