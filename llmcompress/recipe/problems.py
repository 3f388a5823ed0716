"""Converts pydantic's errors into one CompressError: the line, the nearest key, what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmcompress.errors import CompressError, ExitCode, did_you_mean
from llmcompress.recipe.document import Document, Path
from llmcompress.recipe.schema import Schema, at_path, holds_named, keys_at, kinds

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

_TYPES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def validated(document: Document, kind: type[M], schema: Callable[[], Schema]) -> M:
    """The document as data of that kind, every value checked against its type; `schema` is called after a mistake.

    Raises: CompressError for the first problem; it also lists the others.
    """
    try:
        # as JSON and strict: lists may be tuples, but "4" is not 4 and 1 is not true
        return kind.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as found:
        problems, rules = Problems(), schema()
        for error in found.errors():
            explain(problems, document, rules, error)
        raise problems.first() from None


class Problems:
    """Everything wrong with a document, in the order found."""

    def __init__(self) -> None:
        self.found: list[CompressError] = []

    def add(self, code: str, what: str, where: str, fix: str) -> None:
        """One more."""
        self.found.append(CompressError(code, what, where=where, fix=fix, exit_code=ExitCode.USAGE))

    def first(self) -> CompressError:
        """The first problem as an error, which lists the others."""
        first, *others = sorted(self.found, key=_by_line)
        more = "; ".join(f"{other.where}: {other.what}" for other in others)
        fix = f"{first.fix}\n  also: {more}" if more else first.fix
        return CompressError(first.code, first.what, where=first.where, fix=fix, exit_code=ExitCode.USAGE)


def explain(problems: Problems, document: Document, schema: Schema, error: ErrorDetails) -> None:
    """Add one of pydantic's errors, with what to write instead."""
    path: Path = error["loc"]
    where, key = document.where(path), str(path[-1]) if path else document.name
    cause = error.get("ctx", {}).get("error")
    if error["type"] == "extra_forbidden":
        fix = _below_a_stage(schema, path) or did_you_mean(key, keys_at(schema, path[:-1]))
        problems.add("recipe.unknown-key", f"unknown option {key!r}", where, fix)
    elif error["type"] == "missing":
        problems.add("recipe.missing", f"{key!r} is missing", where, f"write `{key}:`")
    elif isinstance(cause, CompressError):
        problems.add(cause.code, cause.what, where, cause.fix)
    elif allowed := _allowed_words(schema, path):
        fix = did_you_mean(str(error["input"]), allowed)
        problems.add("recipe.value", f"{key} cannot be {_shown(document, path, error)}", where, fix)
    elif examples := (at_path(schema, path) or {}).get("examples"):
        what = f"{key} cannot be {_shown(document, path, error)}"
        problems.add("recipe.value", what, where, f"write e.g. `{key}: {examples[0]}`")
    elif "type" in error["type"] or error["type"].endswith("parsing"):
        wanted = kinds(schema, path) - {"null"}
        what = f"{key} must be {' or '.join(_TYPES[kind] for kind in sorted(wanted))}" if wanted else error["msg"]
        raw = document.raw.get(path, str(error["input"]))
        fix = _rewrite(key, wanted, error["input"], raw, keys_at(schema, path))
        problems.add("recipe.type", f"{what}, not {_shown(document, path, error)}", where, fix)
    else:
        said = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
        what = f"{key} {said}" if error["msg"].startswith("Input ") else said
        problems.add("recipe.value", f"{what}, not {_shown(document, path, error)}", where, "change the value")


def _by_line(error: CompressError) -> tuple[int, bool]:
    """Top to bottom; a misspelt key before the key it left missing."""
    line = re.search(r" line (\d+)", error.where)
    return int(line[1]) if line else 0, error.code == "recipe.missing"


def _below_a_stage(schema: Schema, path: Path) -> str | None:
    """What to write if a pass is at the top level of a recipe."""
    stages = [key for key in keys_at(schema, ()) if len(path) == 1 and holds_named(schema, (key,))]
    found = (key for key in stages if path[0] in keys_at(schema, (key, 0)))
    return next((f"write it under `{key}:`, as `  - {path[0]}`" for key in found), None)


def _allowed_words(schema: Schema, path: Path) -> list[str]:
    here: dict[str, Any] = at_path(schema, path) or {}
    return [str(word) for word in here.get("enum", [])]


def _shown(document: Document, path: Path, error: ErrorDetails) -> str:
    value = error["input"]
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    return document.raw.get(path) or ("empty" if value is None else repr(value))


def _rewrite(key: str, wanted: set[str], value: Any, raw: str, keys: list[str]) -> str:
    """The line to write instead, if the intention is clear."""
    number = raw.replace("_", "")
    if value is None:
        return "give it a value or remove the key"
    if "object" in wanted:
        return f"write a mapping with some of {', '.join(keys)}" if keys else "write a mapping"
    if wanted == {"array"}:
        return "start every item with `- `" if isinstance(value, dict) else f"write `{key}: [{raw}]`"
    if isinstance(value, dict | list):
        return f"write `{key}: value` on one line"
    if "boolean" in wanted and raw.lower() in _BOOLEANS:
        return f"write `{key}: {_BOOLEANS[raw.lower()]}`"
    if (
        wanted & {"integer", "number"}
        and isinstance(value, str)
        and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", number)
    ):
        return f"write `{key}: {number}`, without quotes or underscores"
    if "integer" in wanted and isinstance(value, float) and value.is_integer():
        return f"write `{key}: {int(value)}`"
    if "string" in wanted:
        return f'write `{key}: "{raw}"`, in quotes'
    return "write " + " or ".join(_TYPES[kind] for kind in sorted(wanted)) if wanted else "see `llmcompress schema`"
