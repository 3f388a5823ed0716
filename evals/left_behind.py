"""What commands leave behind: digests of files, of studies what does not tell the time, and readers that look on."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
FRONT = "front.json"


def digests(folder: Path) -> dict[str, str]:
    """File → sha256; of files that tell the time only that they are there."""
    return {
        name: "there" if path.name in TIMED else hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in _files(folder).items()
    }


def digests_of_study(folder: Path) -> dict[str, str]:
    """What a search found: the plans and their losses, the front, recipes, models, levels.

    A trial that was being judged when its process was killed is judged again under the next free number; so plans stand
    for numbers here. Workers, dates and seconds are left out, and with them the database.
    """
    report = json.loads((folder / FRONT).read_text(encoding="utf-8"))
    plans = {each["number"]: _digest([each["chosen"], each["tokens"]]) for each in report["trials"]}
    found = {
        f"trial {plans[each['number']]}": _digest([each["loss"], each["costs"], each["problem"], each["uniform"]])
        for each in report["trials"]
    }
    found["front"] = _digest([plans[number] for number in report["front"]])
    found["selected"] = plans[report["selected"]]
    found |= {f"kept {plans[int(number)]}": _digest(kept) for number, kept in report["kept"].items()}
    for made in report["made"]:
        measured = {key: value for key, value in made.items() if key not in ("trial", "folder")}
        found[f"made {plans[made['trial']]}"] = _digest(measured)
        inside = digests(folder / "models" / str(made["trial"]))
        found |= {f"models/{plans[made['trial']]}/{name}": value for name, value in inside.items()}
    for recipe in (folder / "recipes").glob("*.yaml"):
        found[f"recipes/{plans[int(recipe.stem)]}.yaml"] = hashlib.sha256(recipe.read_bytes()).hexdigest()
    levels = digests(folder / "levels")
    found |= {f"levels/{name}": value for name, value in levels.items() if name.endswith(".safetensors")}
    return found | {f"report/{name}": "there" for name in _files(folder / "report")}


@contextmanager
def watched(folder: Path, wanted: Collection[str], partial: list[str], *, parts: str = "") -> Iterator[None]:
    """A reader that looks all the time: a folder has every file or is not there; of a study, the numbered `parts`."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            try:
                folders = [each for each in folder.glob(f"{parts}/*") if each.name.isdigit()] if parts else [folder]
                for each in folders:
                    there = set(_files(each))
                    if there and there != set(wanted):
                        partial.append(f"{len(there)} of {len(wanted)} files in {each.name}")
            except OSError:
                continue

    reader = threading.Thread(target=look)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def differing(wanted: Mapping[str, str], left: Mapping[str, str]) -> list[str]:
    """Names that one has and the other has not, or has otherwise."""
    return sorted(name for name in wanted.keys() | left.keys() if wanted.get(name) != left.get(name))
