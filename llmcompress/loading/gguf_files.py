"""Finds the GGUF file that a name means: the file itself, or a folder with one."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import CompressError, ExitCode
from llmcompress.storage.paths import from_home

SUFFIX = ".gguf"


def gguf_file(model: str) -> Path:
    """The file of that name, or the one in the folder of that name.

    Raises: CompressError when there is none, or there are several.
    """
    path = from_home(model)
    found = _in_folder(path)
    if len(found) == 1:
        return found[0]
    there = ", ".join(each.name for each in found)
    raise CompressError(
        "model.no-gguf",
        f"{model} has several GGUF files: {there}" if found else f"{model} is no GGUF file, and no folder with one",
        fix="name the file itself" if found else "export the model to gguf first",
        exit_code=ExitCode.USAGE,
    )


def lone_gguf(place: Path) -> Path | None:
    """The file itself, or the only GGUF file of a folder without other weights; None: this is another kind of model."""
    if place.is_dir() and any(place.glob("*.safetensors")):
        return None
    found = _in_folder(place)
    return found[0] if len(found) == 1 else None


def _in_folder(place: Path) -> list[Path]:
    """The file itself, or all in the folder."""
    if place.is_dir():
        return sorted(place.glob(f"*{SUFFIX}"))
    return [place] if place.is_file() and place.suffix == SUFFIX else []
