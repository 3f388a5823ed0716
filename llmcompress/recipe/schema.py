"""The JSON Schema of a recipe, and queries on it: what may be at this path? Needs no PyTorch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from llmcompress.recipe.document import Path

Schema = dict[str, Any]


def schema_of(kind: type[BaseModel]) -> Schema:
    """A whole recipe of that kind, with the options of everything that is registered."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


def at_path(schema: Schema, path: Path) -> Schema | None:
    """The part of the schema that describes the value at a path; None when nothing may stand there."""
    here: Schema | None = schema
    for part in path:
        children = (_child(each, part) for each in alternatives(schema, here or {}))
        here = next((inner for inner in children if inner is not None), None)
    return here


def keys_at(schema: Schema, path: Path) -> list[str]:
    """The keys that a mapping at a path may have."""
    return [key for each in _at(schema, path) for key in each.get("properties", {})]


def kinds(schema: Schema, path: Path) -> set[str]:
    """JSON types that the value at a path may have."""
    return {str(each["type"]) for each in _at(schema, path) if "type" in each}


def takes_globs(schema: Schema, path: Path) -> bool:
    """Whether the keys of the mapping at a path are globs, which have dots of their own: `overrides`."""
    return any("properties" in (each.get("additionalProperties") or {}) for each in _at(schema, path) if _is_open(each))


def holds_named(schema: Schema, path: Path) -> bool:
    """Whether the items of the list at a path are mappings of one name each: passes."""
    return is_named(schema, (*path, 0))


def is_named(schema: Schema, path: Path) -> bool:
    """Whether one name with its options stands at a path."""
    return any(each.get("maxProperties") == 1 for each in _at(schema, path))


def _at(schema: Schema, path: Path) -> list[Schema]:
    return alternatives(schema, at_path(schema, path) or {})


def alternatives(root: Schema, schema: Schema) -> list[Schema]:
    """A schema with its references followed and its `anyOf` opened."""
    reference = schema.get("$ref")
    if reference:
        schema = root["$defs"][reference.rpartition("/")[2]]
    if "anyOf" not in schema:
        return [schema]
    return [inner for each in schema["anyOf"] for inner in alternatives(root, each)]


def _is_open(schema: Schema) -> bool:
    return isinstance(schema.get("additionalProperties"), dict)


def _child(schema: Schema, part: str | int) -> Schema | None:
    """None where nothing may stand; an empty schema where anything may."""
    found: Schema | None
    if isinstance(part, int):
        found = schema.get("items")
        return found
    found = schema.get("properties", {}).get(part)
    if found is None and schema.get("additionalProperties") not in (None, False):
        extra = schema["additionalProperties"]
        return extra if isinstance(extra, dict) else {}
    return found
