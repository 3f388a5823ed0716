"""The JSON Schema of a recipe, and the questions asked of it: what may stand at this path?"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from llmcompress.passes.base import PASSES
from llmcompress.recipe.document import Path
from llmcompress.recipe.model import Recipe

Schema = dict[str, Any]

SELECTORS = ("sites", "exclude", "overrides")
"""Options of every pass that say where it works; an override changes how, so it may not contain them."""


def json_schema() -> Schema:
    """The whole recipe for editors, with the options of every registered pass."""
    classes = {name: PASSES[name] for name in PASSES}
    models: list[type[BaseModel]] = [Recipe, *classes.values()]
    asked: list[tuple[type[BaseModel], JsonSchemaMode]] = [(cls, "validation") for cls in models]
    refs, definitions = models_json_schema(asked)
    found: Schema = definitions["$defs"]
    options = {name: _pass_schema(found, refs[cls, "validation"]) for name, cls in classes.items()}
    root = copy.deepcopy(_resolve(found, refs[Recipe, "validation"]))
    one_pass = {"type": "object", "properties": options, "additionalProperties": False, "maxProperties": 1}
    passes = root["properties"]["passes"]
    passes["items"] = {"anyOf": [{**one_pass, "minProperties": 1}, {"type": "string", "enum": list(classes)}]}
    task = found["Evaluate"]["properties"]["perplexity"]
    task["items"] = {"anyOf": [task["items"], {"type": "string", "description": "source or source:split"}]}
    unused = {Recipe.__name__, *(cls.__name__ for cls in classes.values())}
    used = {name: part for name, part in found.items() if name not in unused}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": used}


def at_path(schema: Schema, path: Path) -> Schema | None:
    """The part of the schema that describes the value at a path; None when nothing may stand there."""
    here: Schema | None = schema
    for part in path:
        here = next((inner for each in _alternatives(schema, here or {}) if (inner := _child(each, part))), None)
    return here


def keys_at(schema: Schema, path: Path) -> list[str]:
    """The keys that a mapping at a path may have."""
    return [key for each in _alternatives(schema, at_path(schema, path) or {}) for key in each.get("properties", {})]


def kinds(schema: Schema, path: Path) -> set[str]:
    """JSON types that the value at a path may have."""
    return {str(each["type"]) for each in _alternatives(schema, at_path(schema, path) or {}) if "type" in each}


def nearest(word: str, allowed: list[str]) -> str:
    """`did you mean x?` where something is near, otherwise the whole list."""
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.55)
    near = near or [name for name in allowed if name.replace("_", "") == word.replace("_", "").replace("-", "")]
    return f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(allowed)}"


def _pass_schema(definitions: Schema, reference: Schema) -> Schema:
    """Options of one pass, as YAML may spell them."""
    schema = copy.deepcopy(_resolve(definitions, reference))
    options: Schema = schema["properties"]
    overridable = {name: part for name, part in options.items() if name not in SELECTORS}
    if "overrides" in options:
        options["overrides"]["additionalProperties"] = {
            "type": "object",
            "properties": overridable,
            "additionalProperties": False,
        }
    for name in {"sites", "exclude"} & options.keys():
        kept = {key: value for key, value in options[name].items() if key in ("default", "description")}
        options[name] = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}], **kept}
    return schema


def _resolve(definitions: Schema, schema: Schema) -> Schema:
    reference = schema.get("$ref")
    found: Schema = definitions[reference.rpartition("/")[2]] if reference else schema
    return found


def _alternatives(root: Schema, schema: Schema) -> list[Schema]:
    """A schema with its references followed and its `anyOf` opened."""
    schema = _resolve(root.get("$defs", {}), schema)
    if "anyOf" not in schema:
        return [schema]
    return [inner for each in schema["anyOf"] for inner in _alternatives(root, each)]


def _child(schema: Schema, part: str | int) -> Schema | None:
    if isinstance(part, int):
        return schema.get("items")
    found = schema.get("properties", {}).get(part)
    extra = schema.get("additionalProperties")
    return found or (extra if isinstance(extra, dict) else None)
