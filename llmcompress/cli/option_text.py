"""The JSON Schema of a pass's options → what a person or a program is told of each: values, default, meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llmcompress.recipe.schema import Schema, alternatives

COMMON = ("sites", "exclude", "new_stage", "overrides")
"""Options of every pass that works block by block."""

_LIMITS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_KINDS = {"integer": "whole number", "number": "number", "string": "text", "null": "null", "object": "mapping"}


def options(
    schema: Schema, parts: Mapping[str, Schema], names: Mapping[str, list[str]], *, prefix: str = ""
) -> Iterator[dict[str, Any]]:
    """Every option, those of an inner group behind it by their dotted names; `names`: of what is registered."""
    for name, part in parts.items():
        found = [_with_notes(each, part) for each in alternatives(schema, part)]
        registered = names.get(name, [])
        yield {
            "name": f"{prefix}{name}",
            "values": " or ".join(dict.fromkeys(_values(schema, each) for each in found)),
            "choices": [*(word for each in found for word in _choices(each)), *registered],
            "default": _default(part, found),
            "description": "; one of ".join(filter(None, (str(part.get("description", "")), ", ".join(registered)))),
        }
        for group in found:
            if "properties" in group:
                yield from options(schema, group["properties"], {}, prefix=f"{prefix}{name}.")


def _values(schema: Schema, part: Schema) -> str:
    """`mse | minmax`, `whole number ≥ 1`, `list of number`."""
    if choices := _choices(part):
        return " | ".join(choices)
    kind = str(part.get("type", "any value"))
    if kind == "array":
        inner = alternatives(schema, part.get("items", {}))
        return f"list of {' or '.join(_values(schema, each) for each in inner)}"
    limits = [f"{sign} {part[name]:g}" for name, sign in _LIMITS if name in part]
    return " ".join([_KINDS.get(kind, kind), " and ".join(limits)]).strip()


def _choices(part: Schema) -> list[str]:
    if part.get("type") == "boolean":
        return ["true", "false"]
    return [str(word) for word in part.get("enum", [])]


def _default(part: Schema, found: list[Schema]) -> str:
    """As a recipe writes it."""
    if "default" in part:
        value = part["default"]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "{}" if any(each.get("type") == "object" for each in found) else "required"


def _with_notes(alternative: Schema, part: Schema) -> Schema:
    return {**part, **alternative} if "anyOf" not in part else alternative
