"""Speaks to the Hub: waits and asks again where that helps, passes on what the server says, and knows no token."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.environment import versions
from llmcompress.progress import LOG

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

TRIES = 5
LONGEST_WAIT = 300.0
"""Seconds; a server that wants more is told to the user instead."""

BUSY = (429, 503)
"""The request was not carried out."""
FAILED = (*BUSY, 500, 502, 504)
"""It may have been."""


@dataclass(frozen=True)
class Refusal:
    """An answer that is no success."""

    status: int
    reason: str
    """What the server says; empty: nothing."""
    retry_after: float | None
    """Seconds."""


def hub_api() -> HfApi:
    """The client, with the login of `hf auth login` or HF_TOKEN; there is no other way to give it a token.

    Raises: CompressError (exit code 5) in offline mode.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        what = "HF_HUB_OFFLINE is set: nothing can be published"
        raise hub_error("offline", what, fix="unset it, or save to a folder")
    return huggingface_hub.HfApi(library_name="llmcompress", library_version=versions()["llmcompress"])


def asked(call: Callable[[], T], *, again: tuple[int, ...] = FAILED) -> T:
    """The answer to a request; after a status of `again` it is made again, when the server says or ever more slowly.

    huggingface_hub does the same for the upload of single files, and 2.x for some other requests.
    """
    for number in count(1):
        try:
            return call()
        except Exception as problem:
            refusal = refusal_of(problem)
            if refusal is None or refusal.status not in again or number == TRIES:
                raise
            seconds = float(2 ** (number - 1)) if refusal.retry_after is None else refusal.retry_after
            if seconds > LONGEST_WAIT:
                raise
            said = f": {refusal.reason}" if refusal.reason else ""
            LOG.warning(f"the Hub answered {refusal.status}{said}; asking again in {seconds:.0f} s")
            time.sleep(seconds)
    raise AssertionError("count has no end")


def refusal_of(problem: BaseException) -> Refusal | None:
    """What the server answered, however deep huggingface_hub has wrapped it; None: it was not the server."""
    for each in _causes(problem):
        response = getattr(each, "response", None)
        status = getattr(response, "status_code", None)
        if response is not None and isinstance(status, int):
            return Refusal(status, _reason(response), _seconds(response.headers))
    return None


@contextmanager
def hub_errors(repository: str, *, saved: str, downloads: bool = False) -> Iterator[None]:
    """Everything that the Hub or the network can do to us, as one kind of error; `downloads`: nothing is pushed.

    Raises: CompressError (exit code 5) with the server's own words.
    """
    from huggingface_hub import errors

    network: tuple[type[Exception], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    try:
        yield
    except CompressError:
        raise
    except errors.LocalTokenNotFoundError as problem:
        fix = "log in: `hf auth login`, or set HF_TOKEN"
        raise hub_error("login", "not logged in to the Hub", fix=fix, saved=saved) from problem
    except Exception as problem:
        refusal = refusal_of(problem)
        if refusal is not None:
            raise _refused(refusal, repository, saved, downloads=downloads) from problem
        offline = isinstance(problem, errors.LocalEntryNotFoundError)
        if isinstance(problem, ValueError) and not offline:  # the Hub's objection to the model card or to a large file
            what = f"the Hub does not accept what is sent to {repository}: {_first_line(str(problem))}"
            raise hub_error("refused", what, fix="correct it and push again", saved=saved) from problem
        if any(isinstance(each, network) for each in _causes(problem)):
            cause = list(_causes(problem))[-1]
            doing = "downloading" if downloads else "publishing to"
            what = f"the connection to the Hub broke while {doing} {repository} ({type(cause).__name__})"
            fix = f"check the network and {_DOWNLOAD_AGAIN if downloads else _PUSH_AGAIN}"
            raise hub_error("network", what, fix=fix, saved=saved) from problem
        raise


def hub_error(code: str, what: str, *, fix: str, saved: str = "nothing was sent") -> CompressError:
    """An error of exit code 5."""
    return CompressError(f"hub.{code}", what, fix=fix, saved=saved, exit_code=ExitCode.HUB)


def takes(method: Callable[..., Any], argument: str) -> bool:
    """Whether this version of huggingface_hub has an argument."""
    return argument in inspect.signature(method).parameters


_PUSH_AGAIN = "push again: only what is missing there is sent"
_DOWNLOAD_AGAIN = "give the same command again: only what is missing here is fetched"
_ADVICE_ON_DOWNLOADS: Mapping[int, tuple[str, str]] = {
    403: ("forbidden", "use a token that may read it: `hf auth login`, or set HF_TOKEN"),
    429: ("rate-limit", "wait as long as the Hub says, and give the same command again"),
}
_ADVICE: Mapping[int, tuple[str, str]] = {
    401: ("login", "log in again: `hf auth login`, or set HF_TOKEN"),
    403: ("forbidden", "use a token that may write there: `hf auth login`, or set HF_TOKEN"),
    404: ("not-found", "check the name; a private repository needs a token that may read it"),
    409: ("conflict", "another change was being made: push again"),
    412: ("changed", "look at what changed there, then push again, or open a pull request instead"),
    413: ("too-large", "set a smaller `save.max_shard_size` and compress again"),
    429: ("rate-limit", "wait as long as the Hub says, and push again"),
}


def _refused(refusal: Refusal, repository: str, saved: str, *, downloads: bool) -> CompressError:
    advice = {**_ADVICE, **_ADVICE_ON_DOWNLOADS} if downloads else _ADVICE
    later = f"wait a while, then {_DOWNLOAD_AGAIN if downloads else _PUSH_AGAIN}"
    code, fix = advice.get(refusal.status, ("error", later))
    said = f": {refusal.reason}" if refusal.reason else ""
    what = f"the Hub answered {refusal.status} for {repository}{said}"
    return hub_error(code, what, fix=fix, saved=saved)


def _causes(problem: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    found: BaseException | None = problem
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _reason(response: Any) -> str:
    """From the headers of the Hub, its JSON, or the XML of the file store."""
    header = response.headers.get("X-Error-Message")
    if header:
        return _first_line(str(header))
    try:
        text = str(response.text)
    except Exception:  # the body of a stream that was not read
        return ""
    try:
        told = json.loads(text)
        text = str(told.get("error") or told.get("message") or "") if isinstance(told, dict) else ""
    except ValueError:
        message = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
        text = message[1] if message else "" if "<" in text else text
    return _first_line(text)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _seconds(headers: Mapping[str, str]) -> float | None:
    """`Retry-After`, as seconds or as a date."""
    value = headers.get("Retry-After", "")
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
