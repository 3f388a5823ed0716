"""What leaves: of every folder the files that llmcompress wrote there, each with its place in the repository."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath

from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.base import EXPORTERS
from llmcompress.records.export_report import EXPORT_REPORT, ExportReport
from llmcompress.storage.disk import sha256
from llmcompress.storage.json_file import read_json
from llmcompress.storage.names import CARD, FILES
from llmcompress.storage.ownership import FileDigest, files_text, written_files


@dataclass(frozen=True)
class OutgoingFile:
    """A file as it will stand in the repository."""

    name: str
    """Its path there."""
    content: Path | bytes
    """On this computer, or as it was written for the repository."""
    known: str | None = None
    """The sha256 of a file on this computer, which was verified a moment ago."""

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """By which large files are known."""
        if self.known is not None:
            return self.known
        return hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else sha256(self.content)

    @cached_property
    def blob_id(self) -> str:
        """By which git knows small files."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A folder that is published: what `compress` saved, or an export of it."""

    folder: Path
    target: str | None
    """The target of an export; None: it is a Hugging Face folder as `compress` saves it."""
    files: tuple[str, ...]
    """That we wrote there: nothing else leaves."""

    @cached_property
    def export_report(self) -> ExportReport | None:
        """Of an export."""
        if self.target is None:
            return None
        return ExportReport.model_validate(read_json(self.folder / EXPORT_REPORT, code="report.unreadable"))

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    def places(self, *, alone: bool) -> dict[str, str]:
        """Name in the folder → path in the repository.

        Alone, or first, an artifact has the root. Beside another it has a folder called as its target; a target whose
        files are found at the root by their suffix (GGUF) says so, and brings nothing else.
        """
        if alone or self.target is None:
            return {name: name for name in self.files}
        at_root = EXPORTERS[self.target].found_at_root
        if at_root:
            return {name: name for name in self.files if any(fnmatchcase(name, each) for each in at_root)}
        return {name: f"{self.target}/{name}" for name in self.files}


def artifact_in(folder: Path) -> Artifact:
    """What a folder holds, by the list of files that was written with it.

    Raises: CompressError when llmcompress did not write it, or a name of the list leads out of the folder.
    """
    names = written_files(folder)
    if not names:
        what = (
            "the folder does not exist" if not folder.is_dir() else f"llmcompress did not write this folder ({FILES})"
        )
        fix = "give a folder that `compress`, `distill` or `export` wrote; for any other: `hf upload`"
        raise CompressError("publish.not-ours", what, where=str(folder), fix=fix, exit_code=ExitCode.USAGE)
    there = folder.resolve()
    outside = [name for name in names if not (folder / name).resolve().is_relative_to(there)]
    if outside:
        what, fix = "the list of files names something outside the folder", "compress or export the model again"
        raise CompressError("publish.outside", what, where=", ".join(outside[:5]), fix=fix)
    target = None
    if (folder / EXPORT_REPORT).is_file():
        target = str(read_json(folder / EXPORT_REPORT, code="report.unreadable").get("target"))
        target = target if target in EXPORTERS else None
    return Artifact(folder, target, tuple(name for name in names if name != FILES))


def own_card(folder: Path) -> str | None:
    """A README.md that the user wrote or edited; None where there is none, or the one that `export` wrote."""
    file = folder / CARD
    if not file.is_file():
        return None
    written = written_files(folder).get(CARD)
    return None if written is not None and written.sha256 == sha256(file) else file.read_text(encoding="utf-8")


def outgoing_files(
    artifacts: Sequence[Artifact], *, card: str, rewritten: Mapping[Path, bytes], more: Iterable[OutgoingFile]
) -> tuple[OutgoingFile, ...]:
    """Every file of a repository: the first artifact at the root, the card, and a list with digests for each folder.

    `rewritten`: files whose text differs from the saved one, because that names places on this computer. `more`: what
    stands in no folder, in the place of a file of the same name.
    """
    found: dict[str, OutgoingFile] = {}
    for artifact in artifacts:
        digests = written_files(artifact.folder)
        for name, place in artifact.places(alone=artifact is artifacts[0]).items():
            path = artifact.folder / name
            if PurePosixPath(place).name != CARD:
                digest = None if path in rewritten else digests.get(name)
                known = None if digest is None else digest.sha256
                found.setdefault(place, OutgoingFile(place, rewritten.get(path, path), known))
    found |= {each.name: each for each in more}
    lists = [_list_of(folder, found.values()) for folder in sorted({_top(name) for name in found})]
    return (*found.values(), *lists, OutgoingFile(CARD, card.encode()))


def _list_of(folder: str, files: Iterable[OutgoingFile]) -> OutgoingFile:
    """The list of what stands in one folder of the repository; the card has no digest, for people go on editing it."""
    inside = {each.name.removeprefix(folder): each for each in files if _top(each.name) == folder}
    digests = {name: FileDigest(each.size, each.sha256) for name, each in inside.items()}
    return OutgoingFile(f"{folder}{FILES}", files_text(digests).encode())


def _top(name: str) -> str:
    """`onnx/` of `onnx/model.onnx`, if that is the folder of a target."""
    first, slash, _ = name.partition("/")
    return f"{first}/" if slash and first in EXPORTERS else ""
