"""Settings `a.b=c`: each replaces one value of a document, located and typed by the schema."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmcompress.errors import CompressError, ExitCode, did_you_mean
from llmcompress.recipe.document import SETTING, Document, Path, dotted, read_value
from llmcompress.recipe.schema import Schema, at_path, holds_named, is_named, keys_at, kinds, takes_globs
from llmcompress.recipe.stages import Stage


def with_set(document: Document, settings: Sequence[str], stages: Mapping[str, Stage], schema: Schema) -> Document:
    """The document with every `path=value` applied in order.

    A pass is named by its place (`passes.0.gptq.damping`) or, when it occurs once, by its name
    (`passes.gptq.damping`). Raises: CompressError naming the nearest key for a path that leads nowhere.
    """
    changed = replace(document, data=copy.deepcopy(document.data), places=dict(document.places), raw=dict(document.raw))
    _write_out(changed.data, stages)
    for setting in settings:
        text, equals, value = setting.partition("=")
        if not equals or not text.strip():
            raise _refused(f"{setting!r} is not `path=value`", setting, "write e.g. `calibration.samples=64`")
        path = _path(changed.data, text.strip().split("."), setting, schema)
        _forget(changed, path)
        _put(changed.data, path, _typed(value, path, schema), setting)
        changed.places[path], changed.raw[path] = f"{SETTING}{setting}", value
        _write_out(changed.data, stages)
    return changed


def _write_out(data: dict[str, Any], stages: Mapping[str, Stage]) -> None:
    """Short forms have no inside that a path could lead to."""
    for name, stage in stages.items():
        if name in data:
            data[name] = stage.expanded(data[name])


def _path(data: dict[str, Any], parts: list[str], setting: str, schema: Schema) -> Path:
    """The words between dots → a path that the schema knows."""
    path: Path = ()
    here: Any = data
    while parts:
        word = parts.pop(0)
        step: Path = (word,)
        if "array" in kinds(schema, path) and word.isdecimal():
            step = (int(word),)
        elif holds_named(schema, path):
            step = _item_called(word, here, path, setting)
        elif takes_globs(schema, path):
            # a glob has dots of its own: everything up to the option
            whole = not parts or setting.partition("=")[2].startswith("{")
            step = (".".join([word, *(parts if whole else parts[:-1])]),)
            parts = [] if whole else parts[-1:]
        if at_path(schema, (*path, *step)) is None:
            keys = keys_at(schema, path)
            fix = did_you_mean(word, keys) if keys else f"`{dotted(path)}` is a single value"
            raise _refused(f"{dotted(path) or 'a recipe'} has no key {word!r}", setting, fix)
        for part in step:
            here = _inside(here, part, path, setting, schema)
            path = (*path, part)
    return path


def _item_called(name: str, items: Any, path: Path, setting: str) -> Path:
    """Place and name of the one item of a list that has that name."""
    stage = dotted(path)
    listed = [str(next(iter(item), "")) if isinstance(item, dict) else str(item) for item in items or []]
    found = [index for index, each in enumerate(listed) if each == name]
    if len(found) == 1:
        return found[0], name
    if not found:
        fix = did_you_mean(name, listed) if listed else f"`{stage}` is empty"
        raise _refused(f"{stage} of the recipe has no {name!r}", setting, fix)
    choices = " or ".join(f"{stage}.{index}.{name}" for index in found)
    raise _refused(f"{stage} of the recipe has {name!r} {len(found)} times", setting, f"say which: {choices}")


def _inside(here: Any, part: str | int, path: Path, setting: str, schema: Schema) -> Any:
    """What the data has there, None for a key not written yet."""
    if isinstance(part, int):
        if not isinstance(here, list) or part >= len(here):
            count, stage = len(here) if isinstance(here, list) else 0, dotted(path)
            raise _refused(f"{stage} has {count} items", setting, f"count from 0, or set {stage} itself")
        return here[part]
    if isinstance(here, dict) and is_named(schema, path) and part not in here:
        raise _refused(f"{dotted(path)} is {next(iter(here), '')!r}", setting, "use that name")
    return here.get(part) if isinstance(here, dict) else None


def _put(data: Any, path: Path, value: Any, setting: str) -> None:
    """Write the value, making mappings on the way."""
    for depth, part in enumerate(path[:-1]):
        inner = data[part] if isinstance(part, int) else data.get(part)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict | list):
            parent = dotted(path[: depth + 1])
            raise _refused(f"{parent} is a single value in the recipe", setting, f"set {parent} itself")
        data[part] = inner
        data = inner
    data[path[-1]] = value


def _typed(text: str, path: Path, schema: Schema) -> Any:
    """YAML, except that a text option takes the value as written (`revision=1234567`)."""
    wanted = kinds(schema, path)
    if "string" not in wanted or text.startswith(("[", "{", '"', "'")):
        return read_value(text)
    if wanted & {"integer", "number"} and isinstance(number := read_value(text), int | float):
        return number  # of an option that takes a number or a word, such as `max_windows: all`
    return None if text == "null" and "null" in wanted else text


def _forget(document: Document, path: Path) -> None:
    """Forget the places and raw texts of the old value and everything below it."""
    for known in (document.places, document.raw):
        for old in [old for old in known if old[: len(path)] == path]:
            del known[old]


def _refused(what: str, setting: str, fix: str) -> CompressError:
    return CompressError("recipe.set", what, where=f"{SETTING}{setting}", fix=fix, exit_code=ExitCode.USAGE)
