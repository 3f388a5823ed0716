"""The user's name for a model → a folder with its files: bundled, local, or downloaded from the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.download import download
from llmcompress.loading.gguf_files import SUFFIX, lone_gguf
from llmcompress.storage.paths import from_home, is_there

IN_MEMORY = "memory:"
"""Begins the name of what was handed over in Python: a recipe and a report tell of it, and no file holds it."""

BUILTIN = Path(__file__).parent.parent / "builtin"


@dataclass(frozen=True)
class Source:
    """A folder of model files and where it came from."""

    folder: Path
    name: str
    """The name that the user gave."""
    revision: str | None = None
    """Commit on the Hub; None for a folder of the user's own."""
    is_builtin: bool = False
    gguf: Path | None = None
    """The file, of a model that is one; `folder` is then what transformers read from it, or where the file lies."""

    @property
    def how_to_get_again(self) -> str:
        """What to do about a damaged file."""
        if self.revision:
            repo = self.name.partition("@")[0]
            return f"delete it and download it again: `hf download {repo} --revision {self.revision} --force-download`"
        return "delete it and copy it again; for a model from the Hub: `hf download ORG/NAME --force-download`"


def find_source(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False, as_it_is: bool = False
) -> Source:
    """Find the files of `builtin:NAME`, a local folder or GGUF file, `org/name` or `org/name@revision`.

    What is on the Hub is downloaded if needed: never pickled weights, and Python files only with `trust_remote_code`,
    which for a Hub model needs a full commit, so that what was reviewed is what runs. Of a GGUF file, the folder is
    what transformers reads from it; `as_it_is`: the file's own folder, where config and tokenizer lie beside it.

    Raises: CompressError when there is no such model or it cannot be downloaded.
    """
    local = local_source(model, revision=revision)
    if local is not None:
        return local if as_it_is and (local.folder / "config.json").is_file() else _readable(local)
    repo, _, named_revision = model.partition("@")
    if revision and named_revision and revision != named_revision:
        raise _usage(
            "revision",
            f"two revisions of {repo} are given: {named_revision!r} and {revision!r}",
            "give only one of them",
        )
    wanted = revision or named_revision or None
    if trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", wanted or ""):
        raise _usage(
            "unpinned-code",
            f"`trust_remote_code` would run Python files of {repo}, but no full commit is given",
            f"review the files, then give the 40-digit commit: {repo}@COMMIT",
        )
    path = download(repo, wanted, called=model, with_code=trust_remote_code)
    return Source(path, model, revision=path.name)


def local_source(model: str, *, revision: str | None = None) -> Source | None:
    """What needs no network: `builtin:NAME`, a folder or a GGUF file; None for what can only be an id of the Hub.

    Raises: CompressError for what cannot be either.
    """
    if model.startswith("builtin:"):
        return _builtin(model, revision)
    if model.startswith(IN_MEMORY):
        what = f"{model} was handed over in Python: it is in no folder"
        raise _usage("in-memory", what, "hand the model over again, or name its folder or its id on the Hub")
    place = from_home(model)
    if is_there(place) and (place.is_dir() or place.suffix == SUFFIX):
        if revision:
            raise _usage(
                "revision", f"{model} is on this computer and has no revision {revision!r}", "remove `revision`"
            )
        return Source(place if place.is_dir() else place.parent, model, gguf=lone_gguf(place))
    _check_id(model, model.partition("@")[0])
    return None


def _readable(source: Source) -> Source:
    """What transformers loads: of a GGUF file, its reading of it."""
    if source.gguf is None:
        return source
    from llmcompress.loading.gguf_conversion import converted_folder  # which imports PyTorch

    return replace(source, folder=converted_folder(source.gguf))


def _builtin(model: str, revision: str | None) -> Source:
    name = model.removeprefix("builtin:")
    there = sorted(path.parent.name for path in BUILTIN.glob("*/config.json"))
    if name not in there:
        names = " or ".join(f"builtin:{known}" for known in there)
        raise _usage("unknown-builtin", f"there is no bundled model {name!r}", f"use {names}")
    if revision:
        raise _usage(
            "revision", f"{model} is part of this package and has no revision {revision!r}", "remove `revision`"
        )
    return Source(BUILTIN / name, model, is_builtin=True)


def _check_id(model: str, repo: str) -> None:
    """Refuse at once what cannot be an id, with a message for what the user most likely meant."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

    if is_there(from_home(model)) and from_home(model).is_file():
        raise _usage("not-a-folder", f"{model} is a file", "give the folder that contains config.json and the weights")
    if model.startswith((".", "/", "~")) or "\\" in model:
        raise _usage("no-folder", f"the folder {model} does not exist", "check the path")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise _usage(
            "bad-id",
            f"{model!r} is neither a local folder nor a valid Hub id",
            "give an existing folder, ORG/NAME, ORG/NAME@REVISION or builtin:NAME",
        ) from None


def _usage(code: str, what: str, fix: str) -> CompressError:
    return CompressError(f"model.{code}", what, fix=fix, exit_code=ExitCode.USAGE)
