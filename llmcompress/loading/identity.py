"""Hashes of everything in a folder that decides what a model computes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmcompress.storage.disk import sha256


def identity_of_folder(folder: Path) -> dict[str, str]:
    """Of the safetensors files, and of the config with the code that comes with it."""
    weights, config = hashlib.sha256(), hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        weights.update(bytes.fromhex(sha256(path)))
    for path in [folder / "config.json", *sorted(folder.rglob("*.py"))]:
        config.update(path.read_bytes())
    return {"weights": weights.hexdigest(), "config": config.hexdigest()}


def identity_of_files(place: Path) -> dict[str, str]:
    """Of a file, or of every file in a folder: for runtimes that read formats of their own."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    found = hashlib.sha256()
    for path in files:
        found.update(path.relative_to(place).as_posix().encode() + b"\0" + bytes.fromhex(sha256(path)))
    return {"files": found.hexdigest()}
