"""Stages of a recipe: named lists of registered things, each written as its name and its options.

A stage is one field of `Recipe`: a tuple, annotated with the registry of its possible items. Everything else follows
from the annotation: how it is read and written, where settings lead, the JSON Schema, the hints.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, ValidationInfo
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from llmcompress.errors import CompressError, ExitCode, did_you_mean
from llmcompress.recipe.document import Path
from llmcompress.registry import Registry

SELECTORS = ("sites", "exclude", "overrides")
"""Options that select sites, which an override may not contain."""


@runtime_checkable
class HasShortForm(Protocol):
    """A class whose instances can also be written as one string."""

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """The options of a short form."""


@runtime_checkable
class OnlyOne(Protocol):
    """A class of which there is at most one: its options stand under its name, without a list."""

    only_one: ClassVar[bool]


@dataclass(frozen=True)
class LeavesWeights:
    """Marks a field of a recipe that cannot change a weight: the hash ignores it."""


class Entry(NamedTuple):
    """One item as written."""

    path: Path
    """Within the stage: place and name, in the order in which they are written."""
    name: str
    options: Any


@dataclass(frozen=True)
class Stage(ABC):
    """How items of one registry are written in a recipe."""

    registry: Registry[Any]

    @abstractmethod
    def expanded(self, written: Any) -> Any:
        """The same with short forms expanded; anything unknown is left unchanged."""

    @abstractmethod
    def entries(self, expanded: Any, problems: list[InitErrorDetails]) -> Iterator[Entry]:
        """Every item with a known name; everything else becomes a problem."""

    @abstractmethod
    def written(self, things: Sequence[BaseModel]) -> Any:
        """These items as in a recipe, as JSON."""

    @abstractmethod
    def schema(self, options: dict[str, Any]) -> dict[str, Any]:
        """JSON Schema of the stage, from that of every thing's options."""

    def read(self, value: Any, info: ValidationInfo) -> tuple[BaseModel, ...]:
        """What was written, or things made in Python, as checked things.

        Raises: ValidationError with every problem at its place.
        """
        if isinstance(value, list | tuple) and all(isinstance(each, BaseModel) for each in value):
            return tuple(value)
        problems: list[InitErrorDetails] = []
        entries = self.entries(self.expanded(value), problems)
        found = [_thing(self.registry[entry.name], entry, problems) for entry in entries]
        if problems:
            raise ValidationError.from_exception_data(str(info.field_name), problems)
        return tuple(each for each in found if each is not None)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A function reads, a function writes: the registry is only scanned when a recipe is read."""
        writer = core_schema.plain_serializer_function_ser_schema(self.written)
        return core_schema.with_info_plain_validator_function(self.read, serialization=writer)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The options of every registered thing."""
        options = {}
        for name in self.registry:
            found = handler.resolve_ref_schema(handler(self.registry[name].__pydantic_core_schema__))
            options[name] = _as_written(copy.deepcopy(found))
        return self.schema(options)


class Listed(Stage):
    """An ordered list: `- rtn`, or `- gptq: {scheme: int4_g128}`."""

    def expanded(self, written: Any) -> Any:
        """A name alone becomes a name without options."""
        return [_with_options(each) for each in written] if isinstance(written, list | tuple) else written

    def entries(self, expanded: Any, problems: list[InitErrorDetails]) -> Iterator[Entry]:
        """One item after the other."""
        if not isinstance(expanded, list):
            problems.append(InitErrorDetails(type="list_type", loc=(), input=expanded))
            return
        for index, item in enumerate(expanded):
            if not isinstance(item, dict) or len(item) != 1:
                what = f"a {self.registry.kind} must be a name, or one name with its options"
                fix = f"write each as its own item: `- {next(iter(self.registry))}: {{option: value}}`"
                if isinstance(item, dict) and item and next(iter(item.values())) is None:
                    fix = f"indent the options further than `{next(iter(item))}:`"
                problems.append(_problem((index,), item, _refused("recipe.type", what, fix)))
                continue
            ((name, options),) = item.items()
            if name in self.registry:
                yield Entry((index, name), name, options)
            else:
                what = f"unknown {self.registry.kind} {name!r}"
                error = _refused(f"recipe.unknown-{self.registry.kind}", what, did_you_mean(name, self.registry))
                problems.append(_problem((index,), item, error))

    def written(self, things: Sequence[BaseModel]) -> Any:
        """Each as one name with all its options."""
        return [{self.registry.name_of(type(each)): each.model_dump(mode="json")} for each in things]

    def schema(self, options: dict[str, Any]) -> dict[str, Any]:
        """Items that are a name, or a mapping of one name."""
        one = {"type": "object", "properties": options, "additionalProperties": False}
        named = {**one, "minProperties": 1, "maxProperties": 1}
        return {"type": "array", "items": {"anyOf": [named, {"type": "string", "enum": list(options)}]}}


class Grouped(Stage):
    """A mapping of names to lists, without order: `perplexity: [wikitext2:test, book.txt]`.

    What there is only one of stands there itself: `gate: {kl_mean: 0.05}`.
    """

    def expanded(self, written: Any) -> Any:
        """A text becomes the options that it stands for."""
        if not isinstance(written, dict):
            return written
        return {
            name: self._expanded(self.registry[name], items) if name in self.registry else items
            for name, items in written.items()
        }

    def _expanded(self, cls: type[BaseModel], items: Any) -> Any:
        if not isinstance(items, list) or not isinstance(cls, HasShortForm):
            return items
        return [cls.from_text(each) if isinstance(each, str) else each for each in items]

    def entries(self, expanded: Any, problems: list[InitErrorDetails]) -> Iterator[Entry]:
        """One list after the other."""
        if not isinstance(expanded, dict):
            problems.append(InitErrorDetails(type="dict_type", loc=(), input=expanded))
            return
        for name, items in expanded.items():
            if name not in self.registry:
                problems.append(InitErrorDetails(type="extra_forbidden", loc=(name,), input=items))
            elif _only_one(self.registry[name]):
                yield Entry((name,), name, items)
            elif not isinstance(items, list):
                problems.append(InitErrorDetails(type="list_type", loc=(name,), input=items))
            else:
                yield from (Entry((name, index), name, item) for index, item in enumerate(items))

    def written(self, things: Sequence[BaseModel]) -> Any:
        """The things of each name, each with all its options."""
        found: dict[str, list[Any]] = {}
        for each in things:
            found.setdefault(self.registry.name_of(type(each)), []).append(each.model_dump(mode="json"))
        return {name: its[-1] if _only_one(self.registry[name]) else its for name, its in found.items()}

    def schema(self, options: dict[str, Any]) -> dict[str, Any]:
        """A list for every name, or the one thing."""
        found = {
            name: options[name]
            if _only_one(self.registry[name])
            else {"type": "array", "items": self._item(name, options[name])}
            for name in options
        }
        return {"type": "object", "properties": found, "additionalProperties": False}

    def _item(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        cls = self.registry[name]
        if not isinstance(cls, HasShortForm):
            return options
        return {"anyOf": [options, {"type": "string", "description": cls.from_text.__doc__ or ""}]}


def stages_of(kind: type[BaseModel]) -> dict[str, Stage]:
    """The stages of a recipe, in its order."""
    fields = kind.model_fields.items()
    return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Stage)}


def beside_weights(kind: type[BaseModel]) -> dict[str, Any]:
    """Fields that the hash excludes."""
    found: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if any(isinstance(mark, LeavesWeights) for mark in field.metadata):
            found[name] = True
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[name] = beside_weights(field.annotation)
    return {name: inner for name, inner in found.items() if inner}


def _thing(cls: type[BaseModel], entry: Entry, problems: list[InitErrorDetails]) -> BaseModel | None:
    """One thing, if its options and its overrides are valid."""
    if not isinstance(entry.options, dict):
        what, fix = f"the options of {entry.name} must be a mapping", f"write `{entry.name}: {{option: value}}`"
        problems.append(_problem(entry.path, entry.options, _refused("recipe.type", what, fix)))
        return None
    found = _validated(cls, entry.options, entry.path, problems)
    for glob, changed in getattr(found, "overrides", {}).items():
        path = (*entry.path, "overrides", glob)
        for key in changed.keys() & set(SELECTORS):
            what = f"an override cannot set {key!r}: its glob already selects the sites"
            fix = f"remove `{key}`, or write a second {entry.name}"
            problems.append(_problem((*path, key), changed[key], _refused("recipe.override", what, fix)))
        given = {key: value for key, value in changed.items() if key not in SELECTORS}
        _validated(cls, {**entry.options, **given, "overrides": {}}, path, problems)
    return found


def _validated(
    cls: type[BaseModel], options: dict[str, Any], path: Path, problems: list[InitErrorDetails]
) -> BaseModel | None:
    """As JSON and strict: lists may be tuples, but "4" is not 4 and 1 is not true."""
    try:
        return cls.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as found:
        for each in found.errors():
            at, about = (*path, *each["loc"]), each.get("ctx", {})
            problems.append(InitErrorDetails(type=each["type"], loc=at, input=each["input"], ctx=about))
    return None


def _only_one(cls: type[BaseModel]) -> bool:
    return isinstance(cls, OnlyOne) and cls.only_one


def _with_options(item: Any) -> Any:
    if isinstance(item, str):
        return {item: {}}
    if isinstance(item, dict) and list(item.values()) == [None]:
        return {name: {} for name in item}
    return item


def _problem(path: Path, value: Any, error: CompressError) -> InitErrorDetails:
    return InitErrorDetails(type="value_error", loc=path, input=value, ctx={"error": error})


def _refused(code: str, what: str, fix: str) -> CompressError:
    return CompressError(code, what, fix=fix, exit_code=ExitCode.USAGE)


def _as_written(schema: dict[str, Any]) -> dict[str, Any]:
    """Options as YAML may spell them: one glob without brackets, and overrides with the options of the thing."""
    options: dict[str, Any] = schema["properties"]
    if "overrides" in options:
        changed = {name: part for name, part in options.items() if name not in SELECTORS}
        one = {"type": "object", "properties": changed, "additionalProperties": False}
        options["overrides"]["additionalProperties"] = one
    for name in {"sites", "exclude"} & options.keys():
        about = {key: value for key, value in options[name].items() if key in ("default", "description")}
        options[name] = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}], **about}
    return schema
