"""Puts our part of a model card into a README.md: between two marks, so that everything else in it stays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from llmcompress.errors import CompressError

BEGIN = "<!-- llmcompress: what stands between these two lines is written by `llmcompress push` -->"
END = "<!-- llmcompress: end -->"
_PART = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

JOINED = ("tags", "datasets")
"""Lists to which both sides add."""
OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "model-index")
"""Keys that are replaced where we wrote the card before; a user's first own card keeps them."""
_BITS = re.compile(r"\d+-bit")


def merged_card(own: str | None, ours: Mapping[str, Any], body: str) -> str:
    """A whole README.md; `own`: the one that is there, whose text and settings stay.

    Raises: CompressError when its front matter is not YAML.
    """
    part = f"{BEGIN}\n\n{body.strip()}\n\n{END}"
    if own is None:
        return _written(ours, f"\n{part}\n")
    front = _FRONT.match(own)
    text = own[front.end() :] if front else own
    has_ours = _PART.search(text) is not None
    settings = _merged(_settings(front[1] if front else ""), ours, again=has_ours)
    text = _PART.sub(lambda _: part, text, count=1) if has_ours else f"{text.rstrip()}\n\n{part}\n"
    return _written(settings, text if text.startswith("\n") else f"\n{text}")


def _merged(own: dict[str, Any], ours: Mapping[str, Any], *, again: bool) -> dict[str, Any]:
    found = {**ours, **own}
    if again:
        found |= {key: ours[key] for key in OURS if key in ours}
    for key in JOINED:
        added = _list(ours.get(key))
        outdated = [each for each in _list(own.get(key)) if again and _BITS.fullmatch(str(each)) and each not in added]
        joined = [each for each in dict.fromkeys([*_list(own.get(key)), *added]) if each not in outdated]
        if joined:
            found[key] = joined
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _settings(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark else ""
        fix = "correct the YAML between the two lines `---`"
        raise CompressError(
            "publish.card", "the front matter is not YAML", where=f"README.md{line}", fix=fix
        ) from problem
    if not isinstance(found, dict):
        raise CompressError(
            "publish.card", "the front matter is no mapping", where="README.md", fix="write `key: value`"
        )
    return found


def _written(settings: Mapping[str, Any], text: str) -> str:
    front = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{front}---\n{text}"
