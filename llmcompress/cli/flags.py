"""Errors name a setting as Python spells it (`overwrite=True`); the command line says the same with its own flags."""

from __future__ import annotations

import re

_SPELLINGS = (
    (re.compile(r"set `(overwrite|fresh)=True`"), r"add --\1"),
    (re.compile(r"set `device` to "), "use --device "),
    (re.compile(r"name an `output`"), "give a folder with -o"),
    (re.compile(r"set `data` to "), "as --task-data (in a recipe: `data`) give "),
    (re.compile(r"the same `baseline`"), "the same --baseline"),
)
"""How the library says it → how a command is typed."""


def with_flags(text: str) -> str:
    """The fix of an error in the words of the command line."""
    for python, flags in _SPELLINGS:
        text = python.sub(flags, text)
    return text
