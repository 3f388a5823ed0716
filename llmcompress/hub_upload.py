"""Uploads a finished folder to a repository on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.gate import gate_failure
from llmcompress.records.report import REPORT, read_report


class HubApi(Protocol):
    """The part of `huggingface_hub.HfApi` that is used."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository if it is not there."""

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        """Add the files of a folder as one commit."""


def upload(folder: Path, repo_id: str, *, private: bool, message: str, api: HubApi | None = None) -> str:
    """Create the repository if necessary, and upload every file of the folder; returns the URL of the repository.

    The token is that of `hf auth login` or HF_TOKEN; there is no argument for one, so that it cannot be written
    anywhere.

    Raises: CompressError (exit code 5) for any error of the Hub or the network; exit code 6 for a result that its
    quality gate does not let pass.
    """
    refuse_failed_gate(folder)
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

    network_errors: tuple[type[Exception], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as problem:
        what = f"{repo_id!r} is not a valid repository id"
        raise CompressError("hub.bad-id", what, fix="use the form ORG/NAME", exit_code=ExitCode.USAGE) from problem
    if api is None and constants.HF_HUB_OFFLINE:
        raise _failed("offline", "HF_HUB_OFFLINE is set: nothing can be uploaded", "unset it, or save to a folder")
    used = api or cast(HubApi, huggingface_hub.HfApi(library_name="llmcompress"))
    try:
        used.create_repo(repo_id, private=private, exist_ok=True)
        used.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message)
    except errors.LocalTokenNotFoundError as problem:
        raise _failed("login", "not logged in to the Hub", "log in: `hf auth login`, or set HF_TOKEN") from problem
    except errors.HfHubHTTPError as problem:
        raise _refused(problem, repo_id) from problem
    except network_errors as problem:
        what = f"the upload to {repo_id} was interrupted ({type(problem).__name__})"
        raise _failed("network", what, "check the network and try again") from problem
    return f"{constants.ENDPOINT}/{repo_id}"


def refuse_failed_gate(folder: Path) -> None:
    """What is worse than its recipe allows stays where it is.

    Raises: CompressError (exit code 6) naming the limits.
    """
    if (folder / REPORT).is_file():
        failure = gate_failure(read_report(folder), saved=f"{folder}, not published")
        if failure is not None:
            raise failure


def _refused(problem: Exception, repo_id: str) -> CompressError:
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status in (401, 403, 404):
        what = f"the current login may not write to {repo_id} ({status})"
        return _failed("login", what, "log in with a write token: `hf auth login`, or set HF_TOKEN")
    return _failed("error", f"the Hub answered {status or type(problem).__name__} for {repo_id}", "try again later")


def _failed(code: str, what: str, fix: str) -> CompressError:
    return CompressError(f"hub.{code}", what, fix=fix, saved="the model in memory", exit_code=ExitCode.HUB)
