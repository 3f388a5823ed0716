"""Recipe text → plain data that keeps the line of every key; the pitfalls of YAML are refused here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from llmcompress.errors import CompressError, ExitCode

Path = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 20_000
"""Values after aliases are expanded: a few lines of aliases can stand for billions."""

SETTING = "setting "
"""Begins the place of a value that `path=value` wrote, and not a line of the file."""

_CORE = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"null|Null|NULL|~|",
    # leading zeros and more than 18 digits are how revisions look, not how numbers are written
    "int": r"[-+]?(?:0|[1-9][0-9]{0,17})",
    "float": r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
}
"""Scalars that are not strings, as in YAML 1.2: `no`, `4_0` and `2024-01-01` are strings, `1e-4` is a number."""


@dataclass(frozen=True)
class Document:
    """A recipe before it is checked: values, and where each was written."""

    name: str
    data: dict[str, Any]
    places: dict[Path, str] = field(default_factory=dict)
    """Path of a key → `line 3`, or the setting that wrote it."""
    raw: dict[Path, str] = field(default_factory=dict)
    """Path of a scalar → exactly what was written."""

    def where(self, path: Path) -> str:
        """The nearest known place of a path, and the path itself."""
        known = next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), "")
        if known.startswith(SETTING):
            return known
        named = f"{self.name} {known}".strip()
        return f"{named} ({dotted(path)})" if path else named


def dotted(path: Path) -> str:
    """`passes.0.gptq.damping`: the spelling that settings use."""
    return ".".join(str(part) for part in path)


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, without tags, with limits."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)
    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse tags and sizes at the event, before anything is built."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace(_CORE, "!!")
            raise _Refused(
                "recipe.tag", f"the YAML tag {tag} is not allowed", event, "remove it: a recipe is plain data"
            )
        self.nodes += 1
        if self.nodes > MAX_VALUES:
            raise _Refused("recipe.too-large", f"more than {MAX_VALUES} values", event, "is this the right file?")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(
                "recipe.too-large", f"the recipe is nested deeper than {MAX_DEPTH} levels", event, "reduce the nesting"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class RecipeDumper(yaml.SafeDumper):
    """Quotes exactly those strings that `RecipeLoader` would not read as strings."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out."""
        return True


for _kind, _pattern in _SCALARS.items():
    for _class in (RecipeLoader, RecipeDumper):
        _class.add_implicit_resolver(f"{_CORE}{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)


def read_file(path: FilePath) -> Document:
    """Read a recipe file.

    Raises: CompressError when it cannot be read, and like `read_document`.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as problem:
        raise CompressError(
            "recipe.unreadable",
            f"cannot read the recipe: {getattr(problem, 'strerror', problem)}",
            where=str(path),
            fix="give a YAML file, or the name of a preset (`llmcompress recipes ls` lists them)",
            exit_code=ExitCode.USAGE,
        ) from None
    return read_document(text, str(path))


def read_document(text: str | bytes, name: str) -> Document:
    """Read one YAML mapping.

    Raises: CompressError with the line for anything that is not plain, unambiguous data.
    """
    with _naming(name):
        root = _compose(text)
        if root is None:
            raise _Refused("recipe.empty", "the recipe is empty", None, "write at least `passes:`")
        if not isinstance(root, yaml.MappingNode):
            raise _Refused("recipe.yaml", "a recipe is a mapping of keys to values", root, "begin with `passes:`")
        document = Document(name, {})
        document.data.update(_Reader(document).value(root, ()))
        return document


def read_value(text: str) -> Any:
    """The value after the `=` of a setting: any YAML on one line.

    Raises: CompressError when it is not YAML.
    """
    with _naming(SETTING.strip()):
        node = _compose(text)
        return None if node is None else _Reader(Document(SETTING.strip(), {})).value(node, ())


def read_json_object(text: str) -> dict[str, Any]:
    """Read one JSON object.

    Raises: CompressError for anything else, and for a key that is written twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise _Refused("recipe.duplicate-key", f"the key {key!r} is written twice", None, "keep one of the two")
        return found

    with _naming("recipe"):
        try:
            data = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as problem:
            raise _Refused("recipe.json", f"not JSON: {problem}", None, "correct the text there") from None
        if not isinstance(data, dict):
            raise _Refused("recipe.json", "a recipe is an object of keys and values", None, 'begin with {"passes": ')
        return data


def write_yaml(data: Any) -> str:
    """The text that `read_document` reads back to the same data."""
    return yaml.dump(data, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)


class _Refused(Exception):
    """A problem at a node or an event, before the name of the file is added."""

    def __init__(self, code: str, what: str, at: Any, fix: str) -> None:
        self.code, self.what, self.fix = code, what, fix
        self.line = None if at is None else at.start_mark.line + 1


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except _Refused as problem:
        where = name if problem.line is None else f"{name} line {problem.line}"
        raise CompressError(
            problem.code, problem.what, where=where, fix=problem.fix, exit_code=ExitCode.USAGE
        ) from None


def _compose(text: str | bytes) -> yaml.Node | None:
    if len(text) > MAX_BYTES:
        what = f"the recipe has {len(text)} bytes; the limit is {MAX_BYTES}"
        raise _Refused("recipe.too-large", what, None, "is this the right file?")
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        loader = RecipeLoader(decoded)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except UnicodeDecodeError as problem:
        raise _Refused("recipe.yaml", f"not UTF-8 text: {problem.reason}", None, "save the file as UTF-8") from None
    except yaml.MarkedYAMLError as problem:
        at = problem.problem_mark or problem.context_mark
        what = ", ".join(part for part in (problem.context, problem.problem) if part)
        refused = _Refused("recipe.yaml", f"not YAML: {what}", None, "check indentation, colons and quotes there")
        refused.line = None if at is None else at.line + 1
        raise refused from None
    except yaml.YAMLError as problem:
        raise _Refused("recipe.yaml", f"not YAML: {problem}", None, "save the file as plain UTF-8 text") from None


class _Reader:
    """Nodes → values, filling a document's places and raw texts."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or id(node) in self.open:
            raise _Refused("recipe.too-large", "the aliases expand to too many values", node, "write the values out")
        if isinstance(node, yaml.ScalarNode):
            self.document.raw[path] = node.value
            return _scalar(node)
        self.open.add(id(node))
        found = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.items(node, path)
        self.open.discard(id(node))
        return found

    def items(self, node: yaml.Node, path: Path) -> list[Any]:
        for index, item in enumerate(node.value):
            self.document.places[(*path, index)] = f"line {item.start_mark.line + 1}"
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(_scalar(key_node), str):
                raise _Refused("recipe.yaml", "a key must be a word", key_node, "quote it if it is meant as a name")
            if key in found:
                what = f"the key {key!r} is written twice, on lines {lines[key]} and {line}"
                raise _Refused("recipe.duplicate-key", what, key_node, "keep one of the two")
            lines[key] = line
            self.document.places[(*path, key)] = f"line {line}"
            found[key] = self.value(value_node, (*path, key))
        return found


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    kind = str(node.tag).removeprefix(_CORE)
    if kind == "null":
        return None
    if kind == "bool":
        return str(node.value).lower() == "true"
    if kind == "int":
        return int(node.value)
    if kind == "float":
        number = float(node.value)
        if not math.isfinite(number):
            raise _Refused("recipe.value", f"{node.value} is too large", node, "write a finite number")
        return number
    return str(node.value)
