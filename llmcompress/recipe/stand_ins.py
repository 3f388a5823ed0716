"""Stand-ins for recipes and passes, made of their JSON Schema: they find a mistake before PyTorch is imported.

They know keys, types, bounds and words; what only a pass itself can tell (does that scheme exist, do two options agree)
they let through. So they may be more lenient than the real classes and never stricter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from llmcompress.evaluation.settings.base import METRIC_SETTINGS
from llmcompress.recipe.schema import Schema, alternatives
from llmcompress.recipe.stages import Grouped, Listed
from llmcompress.registry import Registry

_TYPES: Mapping[str, Any] = {"boolean": bool, "integer": int, "number": float, "string": str, "null": None}
_LIMITS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "minLength": "min_length",
    "minItems": "min_length",
    "pattern": "pattern",
}


def stand_in(schema: Schema) -> type[BaseModel]:
    """A class that reads a recipe as `Recipe` does."""
    stages = {
        "data": Listed(_registry("step", schema["properties"]["data"], schema)),
        "passes": Listed(_registry("pass", schema["properties"]["passes"], schema)),
        "evaluate": Grouped(METRIC_SETTINGS),
        "export": Listed(_registry("exporter", schema["properties"]["export"], schema)),
    }
    written: dict[str, Any] = {
        name: (Annotated[tuple[BaseModel, ...], stage], ... if name in schema["required"] else None)
        for name, stage in stages.items()
    }
    return _model("Recipe", schema, schema, **written)


def _registry(kind: str, stage: Schema, root: Schema) -> Registry[BaseModel]:
    """Of what may stand in a list of names with options."""
    found: Registry[BaseModel] = Registry(kind, __name__)
    for name, options in stage["items"]["anyOf"][0]["properties"].items():
        found.register(name)(_model(name, options, root))
    return found


def _model(name: str, schema: Schema, root: Schema, **given: Any) -> type[BaseModel]:
    """A class with these fields. Of what is left out only one thing matters: there are no overrides."""
    required = schema.get("required", ())
    fields: dict[str, Any] = {
        key: (_type(part, root), ... if key in required else {} if part.get("type") == "object" else None)
        for key, part in schema["properties"].items()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **{**fields, **given})


def _type(schema: Schema, root: Schema) -> Any:
    """The type that says in Python what a schema says; `Any` where that is not plain."""
    found = alternatives(root, schema)
    kinds = [each for each in found if each.get("type") != "null"]
    if len(kinds) != 1:  # an error inside a union names its member, and the class may have others
        return Any
    one = _single(kinds[0], root)
    return one if len(found) == 1 else one | None


def _single(schema: Schema, root: Schema) -> Any:
    limits = {ours: schema[theirs] for theirs, ours in _LIMITS.items() if theirs in schema}
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if "properties" in schema:
        return _model(str(schema.get("title", "Options")), schema, root)
    if schema.get("type") == "array":
        inner = tuple.__class_getitem__((_type(schema.get("items", {}), root), ...))
        return Annotated[inner, Field(**limits)]
    if schema.get("type") == "object":
        inside = isinstance(schema.get("additionalProperties"), dict)
        return dict[str, dict[str, Any]] if inside else dict[str, Any]
    plain = _TYPES.get(str(schema.get("type")), Any)
    return Annotated[plain, Field(**limits)] if limits else plain
