"""Silences transformers' progress bars and advice for a while; we check and report the same things ourselves."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, no log lines below error, no Python warnings; all as before afterwards.

    compressed-tensors asks neither transformers nor TQDM_DISABLE whether its bars are wanted: what is written to
    stderr meanwhile is dropped. Errors are exceptions.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def loader_message(problem: Exception) -> str:
    """What a loader complained about, in one line; a first line that only announces the next is joined with it."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(problem).__name__
