"""Waits for a database that is down: calls are repeated with growing pauses until it answers, or patience ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from llmcompress.errors import CompressError, ExitCode, without_tokens
from llmcompress.progress import Progress, Silent

T = TypeVar("T")

FIRST_SECONDS, LONGEST_SECONDS = 0.5, 30.0
"""Of the pauses, each twice as long as the one before."""


@dataclass(frozen=True)
class Patience:
    """How long is waited for the database of a study."""

    seconds: float = 600.0
    saved: str = "outcomes that the database did not take are in the study's folder: run the same command again"
    progress: Progress = field(default_factory=Silent)
    sleep: Callable[[float], None] = time.sleep

    def __call__(self, call: Callable[[], T]) -> T:
        """What the call returns, once the database answers.

        Raises: CompressError when it does not for too long.
        """
        pause, waited = FIRST_SECONDS, 0.0
        while True:
            try:
                return call()
            except Exception as problem:
                if not is_down(problem):
                    raise
                if waited >= self.seconds:
                    raise self._gave_up(problem) from problem
                if not waited:
                    self.progress.note("the database of the study does not answer; waiting for it")
                self.sleep(pause)
                waited, pause = waited + pause, min(2 * pause, LONGEST_SECONDS)

    def _gave_up(self, problem: Exception) -> CompressError:
        return CompressError(
            "search.database",
            f"the database of the study has not answered for {self.seconds:.0f} s: "
            f"{without_tokens(str(problem)).strip().partition(chr(10))[0][:200]}",
            fix="start the database and run the same command again",
            saved=self.saved,
            exit_code=ExitCode.HUB,
        )


def is_down(problem: BaseException) -> bool:
    """Whether an error says that the database, or the gRPC proxy before it, could not be reached or used just now.

    An IntegrityError comes from two processes that make the tables, or a trial, at the same moment.
    """
    kinds = {each.__name__ for each in type(problem).__mro__}
    return bool(kinds & {"StorageInternalError", "OperationalError", "InterfaceError", "IntegrityError", "RpcError"})
