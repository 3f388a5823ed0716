"""Downloads a model from the Hub: checks before it downloads, never fetches pickle files, explains every refusal."""

from __future__ import annotations

import errno
from pathlib import Path

from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.files import require_safetensors

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
_UNWANTED = ("*/*", "consolidated*")
"""Subfolders hold the same weights in other formats, and so does Mistral's `consolidated.safetensors`."""
_SECONDS_TO_ANSWER = 10.0


def download(repo: str, revision: str | None, *, called: str, with_code: bool) -> Path:
    """The cached snapshot folder of a repository, named after its commit.

    When the Hub cannot be reached, what an earlier run downloaded is used.

    Raises: CompressError (exit code 5) when the repository cannot be had, (3) when it holds no safetensors.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    # the base class of requests' or httpx's errors, whichever this version of huggingface_hub speaks through
    network_errors: tuple[type[Exception], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    commit, offline = revision, constants.HF_HUB_OFFLINE
    try:
        if not offline:
            try:
                found = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=_SECONDS_TO_ANSWER)
                require_safetensors([file.rfilename for file in found.siblings or []], where=called)
                commit = found.sha or revision
            except errors.HfHubHTTPError:
                raise
            except network_errors:
                offline = True
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=commit,
            allow_patterns=[*_WANTED, *(("*.py",) if with_code else ())],
            ignore_patterns=list(_UNWANTED),
            local_files_only=offline,
            library_name="llmcompress",
        )
    except errors.LocalEntryNotFoundError as problem:
        raise _failed(
            "offline",
            f"{called} is not in the local cache, and the Hub cannot be reached",
            "check the network and HF_HUB_OFFLINE, give a local folder, or try `builtin:books-llama`",
        ) from problem
    except errors.HfHubHTTPError as problem:
        raise _refused(problem, repo, revision) from problem
    except network_errors as problem:
        raise _broken_off(problem, called) from problem
    return Path(folder)


def _refused(problem: Exception, repo: str, revision: str | None) -> CompressError:
    """The Hub answered, and the answer was no."""
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{repo}"
    has_token = bool(get_token())
    login = "use a token that may read it" if has_token else "log in: `hf auth login`"
    if isinstance(problem, errors.GatedRepoError):
        return _failed(
            "gated",
            f"{repo} is gated: only users with granted access can download it",
            f"request access at {page}, then {login}",
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return _failed("no-revision", f"{repo} has no revision {revision!r}", f"see the branches and commits at {page}")
    if isinstance(problem, errors.RepositoryNotFoundError):
        what = f"{repo} is neither a local folder nor a public model on the Hub"
        return _failed("not-found", what, f"check the spelling; for a private model, {login}")
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status == 401:
        return _failed("login", f"the Hub rejected the login for {repo}", "log in again: `hf auth login`")
    return _failed(
        "error", f"the Hub answered {status or type(problem).__name__} for {repo}", "run the command again later"
    )


def _broken_off(problem: Exception, called: str) -> CompressError:
    if getattr(problem, "errno", None) == errno.ENOSPC:
        return CompressError(
            "hub.disk-full",
            f"the disk is full: {called} could not be downloaded",
            fix="free space, or point HF_HOME at a larger disk, and run the command again",
            saved="files that were downloaded completely",
            exit_code=ExitCode.RESOURCES,
        )
    what = f"the download of {called} was interrupted ({type(problem).__name__})"
    return _failed(
        "network", what, "check the network and run the command again", saved="files that were downloaded completely"
    )


def _failed(code: str, what: str, fix: str, saved: str = "nothing was written") -> CompressError:
    return CompressError(f"hub.{code}", what, fix=fix, saved=saved, exit_code=ExitCode.HUB)
