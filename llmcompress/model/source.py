"""What the user called the model → a folder with its files: bundled, local, or downloaded from the Hub."""

from __future__ import annotations

import errno
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.tensors import require_safetensors

BUILTIN = Path(__file__).parent.parent / "builtin"

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_UNWANTED = ["*/*", "consolidated*"]
"""Subfolders hold other formats of the same weights, and so does Mistral's `consolidated.safetensors`."""
_SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class Source:
    """A folder of model files and where it came from."""

    folder: Path
    name: str
    """As the user wrote it."""
    revision: str | None = None
    """Commit on the Hub; None for a folder of the user's own."""
    is_builtin: bool = False

    @property
    def how_to_get_again(self) -> str:
        """What to do about a damaged file."""
        if self.revision:
            return f"delete it and download it again: hf download {_split(self.name)[0]} --force-download"
        return "copy the file again from where the model came from (`hf download ORG/NAME --force-download` for a Hub model)"


def find_source(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find the files of `builtin:NAME`, a local folder, `org/name` or `org/name@revision`; download them if needed.

    Pickled weights are never downloaded. Python files are only with `trust_remote_code`, which for a Hub model needs
    a full commit: what was reviewed is then what runs.

    Raises: CompressError when there is no such model or it cannot be had.
    """
    if model.startswith("builtin:"):
        return _builtin(model, revision)
    if Path(model).expanduser().is_dir():
        if revision:
            raise _usage("model.revision", f"{model} is a local folder: it has no revision {revision!r}", "leave out the revision")
        return Source(Path(model).expanduser(), model)
    repo, at = _split(model)
    if revision and at and revision != at:
        raise _usage("model.revision", f"two revisions: {at!r} in the model's name and {revision!r}", "keep one of them")
    _check_id(model, repo)
    wanted_revision = revision or at
    if trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", wanted_revision or ""):
        raise _usage(
            "model.unpinned-code",
            f"`trust_remote_code` runs Python files of {repo}, and no full commit is named",
            f"review the files, then write the 40-digit commit: {repo}@COMMIT",
        )
    return _from_hub(model, repo, wanted_revision, with_code=trust_remote_code)


def _builtin(model: str, revision: str | None) -> Source:
    name = model.removeprefix("builtin:")
    there = sorted(path.parent.name for path in BUILTIN.glob("*/config.json"))
    if name not in there:
        raise _usage("model.unknown-builtin", f"there is no bundled model {name!r}", f"use builtin:{' or builtin:'.join(there)}")
    if revision:
        raise _usage("model.revision", f"{model} is part of this package: it has no revision", "leave out the revision")
    return Source(BUILTIN / name, model, is_builtin=True)


def _split(model: str) -> tuple[str, str | None]:
    repo, _, revision = model.partition("@")
    return repo, revision or None


def _check_id(model: str, repo: str) -> None:
    """Refuse at once what cannot be an id, in the words of what the user most likely meant."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(model).expanduser().is_file():
        raise _usage("model.not-a-folder", f"{model} is a file", "give the folder that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or "\\" in model:
        raise _usage("model.no-folder", f"there is no folder {model}", "check the path")
    try:
        validate_repo_id(repo)
    except HFValidationError as problem:
        raise _usage(
            "model.bad-id",
            f"{model!r} is no local folder and no Hub id",
            "write an existing folder, ORG/NAME, ORG/NAME@REVISION or builtin:NAME; letters, digits and -._ only",
        ) from problem


def _from_hub(model: str, repo: str, revision: str | None, *, with_code: bool) -> Source:
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.constants import is_offline_mode

    commit = revision
    offline = is_offline_mode()
    if not offline:
        try:
            found = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=_SECONDS_TO_ANSWER)
            require_safetensors([file.rfilename for file in found.siblings or []], where=model)
            commit = found.sha or revision
        except errors.HfHubHTTPError as problem:
            raise _refused_by_hub(problem, model, repo, revision) from problem
        except _network_errors():
            offline = True
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=commit,
            allow_patterns=[*_WANTED, "*.py"] if with_code else _WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=offline,
            library_name="llmcompress",
        )
    except errors.LocalEntryNotFoundError as problem:
        raise _hub(
            "hub.offline",
            f"{model} is not in the local cache, and the Hub cannot be reached",
            "check the network and HF_HUB_OFFLINE, give a local folder, or use builtin:books-llama",
        ) from problem
    except errors.HfHubHTTPError as problem:
        raise _refused_by_hub(problem, model, repo, revision) from problem
    except _network_errors() as problem:
        if getattr(problem, "errno", None) == errno.ENOSPC:
            raise CompressError(
                "hub.disk-full",
                f"the disk is full: {model} could not be downloaded",
                fix="free space, or point HF_HOME to a larger disk; what was downloaded is kept",
                exit_code=ExitCode.RESOURCES,
            ) from problem
        raise _hub("hub.network", f"the download of {model} broke off", "run the command again: finished files are kept") from problem
    return Source(Path(folder), model, revision=Path(folder).name)


def _refused_by_hub(problem: Exception, model: str, repo: str, revision: str | None) -> CompressError:
    """The Hub answered, and the answer was no."""
    from huggingface_hub import errors, get_token

    login = "" if get_token() else "log in first: `hf auth login`; "
    if isinstance(problem, errors.GatedRepoError):
        return _hub("hub.gated", f"{repo} is open only to users who asked for access", f"{login}ask for access at {_page(repo)}")
    if isinstance(problem, errors.RevisionNotFoundError):
        return _hub("hub.no-revision", f"{repo} has no revision {revision!r}", f"see the branches and commits at {_page(repo)}")
    if isinstance(problem, errors.RepositoryNotFoundError):
        login = "check that your token may read it" if get_token() else "log in: `hf auth login`"
        return _hub("hub.not-found", f"there is no model {repo} on the Hub, or it is private", f"check the spelling; for a private model {login}")
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status == 401:
        return _hub("hub.login", f"the Hub does not accept the token (asked for {model})", "log in again: `hf auth login`")
    return _hub("hub.error", f"the Hub answered with error {status or type(problem).__name__} for {model}", "run the command again later")


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failing connection raises: huggingface_hub speaks through requests (OSErrors) before 1.0, through httpx since."""
    if importlib.util.find_spec("httpx") is None:
        return (OSError,)
    import httpx

    return (OSError, httpx.TransportError)


def _page(repo: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{repo}"


def _usage(code: str, what: str, fix: str) -> CompressError:
    return CompressError(code, what, fix=fix, exit_code=ExitCode.USAGE)


def _hub(code: str, what: str, fix: str) -> CompressError:
    return CompressError(code, what, fix=fix, exit_code=ExitCode.HUB)
