"""The libraries below us take seconds to import: that is said, they are kept quiet, and it is done fast."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from llmcompress.progress import Progress

_SWITCHES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "LOGURU_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Each library's own, read when it is imported. compressed-tensors asks tqdm and loguru."""

_CHATTY = ("bitsandbytes",)
"""Loggers that recommend further packages, on every machine without a GPU."""


def quiet_libraries() -> None:
    """Ask the libraries for silence, before they are imported: one display only. The environment's own wish wins."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    for name in _CHATTY:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:  # neither -W nor PYTHONWARNINGS
        warnings.simplefilter("ignore")


@contextmanager
def loading_libraries(progress: Progress) -> Iterator[None]:
    """Import PyTorch and transformers inside.

    They make a million objects that stay: looking among them for garbage meanwhile takes a quarter of the time.
    """
    if "torch" not in sys.modules:
        progress.stage("loading PyTorch and transformers", 0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
