"""`--set a.b=c`: one value of a document replaced from the command line, found and typed by the schema."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.settings import perplexity_task
from llmcompress.recipe.document import Document, Path, dotted, read_value
from llmcompress.recipe.schema import Schema, at_path, keys_at, kinds, nearest


def with_set(document: Document, settings: Sequence[str], schema: Schema) -> Document:
    """The document with every `path=value` applied in order.

    A pass is named by its place (`passes.0.gptq.damping`) or, when it occurs once, by its name
    (`passes.gptq.damping`). Raises: CompressError naming the nearest key for a path that leads nowhere.
    """
    changed = replace(document, data=copy.deepcopy(document.data), places=dict(document.places), raw=dict(document.raw))
    for setting in settings:
        text, equals, value = setting.partition("=")
        if not equals or not text.strip():
            raise _refused(f"{setting!r} is not `path=value`", setting, "write e.g. --set calibration.samples=64")
        path = _path(changed.data, text.strip().split("."), setting, schema)
        _forget(changed, path)
        _put(changed.data, path, _typed(value, path, schema), setting)
        changed.places[path], changed.raw[path] = f"--set {setting}", value
    return changed


def _path(data: dict[str, Any], parts: list[str], setting: str, schema: Schema) -> Path:
    """The words between dots → a path that the schema knows."""
    path: Path = ()
    here: Any = data
    while parts:
        word, kind = parts.pop(0), kinds(schema, path)
        step: Path = (int(word),) if "array" in kind and word.isdecimal() else (word,)
        if path == ("passes",) and isinstance(step[0], str):
            step = _pass_called(word, here, setting)
        elif path == ("passes",) and not parts:
            raise _refused("a whole pass cannot be set", setting, f"write --set passes.{word}.NAME.OPTION=value")
        elif path[-1:] == ("overrides",) and parts:
            # a glob has dots of its own: everything up to the last word
            step = (".".join([word, *parts[:-1]]),)
            parts = parts[-1:]
        if at_path(schema, (*path, *step)) is None:
            keys = keys_at(schema, path)
            fix = nearest(word, keys) if keys else f"`{dotted(path)}` is a single value"
            raise _refused(f"there is no {word!r} in {dotted(path) or 'a recipe'}", setting, fix)
        for part in step:
            here = _inside(here, part, (*path, part), setting)
            path = (*path, part)
    return path


def _pass_called(name: str, passes: Any, setting: str) -> Path:
    listed = [next(iter(item)) if isinstance(item, dict) and item else item for item in passes or []]
    found = [index for index, each in enumerate(listed) if each == name]
    if len(found) == 1:
        return found[0], name
    if not found:
        fix = nearest(name, [str(each) for each in listed]) if listed else "the recipe has no passes"
        raise _refused(f"the recipe has no pass {name!r}", setting, fix)
    choices = " or ".join(f"passes.{index}.{name}" for index in found)
    raise _refused(f"the recipe has {len(found)} passes {name!r}", setting, f"say which: {choices}")


def _inside(here: Any, part: str | int, path: Path, setting: str) -> Any:
    """What the data has there, None for a key not written yet."""
    if isinstance(part, int):
        if not isinstance(here, list) or part >= len(here):
            count = len(here) if isinstance(here, list) else 0
            raise _refused(
                f"{dotted(path[:-1])} has {count} items", setting, f"count from 0, or set {dotted(path[:-1])} itself"
            )
        return here[part]
    if isinstance(here, str):
        return {} if here == part else None
    if isinstance(here, dict) and len(path) == 3 and path[0] == "passes" and part not in here:
        raise _refused(f"{dotted(path[:-1])} is {next(iter(here), '')!r}", setting, "name the pass that stands there")
    return here.get(part) if isinstance(here, dict) else None


def _put(data: Any, path: Path, value: Any, setting: str) -> None:
    """Write the value, making mappings on the way; the short forms of a pass and of a text become mappings."""
    for depth, part in enumerate(path[:-1]):
        inner = data[part] if isinstance(part, int) else data.get(part)
        if isinstance(inner, str) and isinstance(part, int):
            inner = {inner: {}} if path[0] == "passes" else perplexity_task(inner)
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
    return None if text == "null" and "null" in wanted else text


def _forget(document: Document, path: Path) -> None:
    """Drop what was known of the old value and of all below it."""
    for known in (document.places, document.raw):
        for old in [old for old in known if old[: len(path)] == path]:
            del known[old]


def _refused(what: str, setting: str, fix: str) -> CompressError:
    return CompressError("recipe.set", what, where=f"--set {setting}", fix=fix, exit_code=ExitCode.USAGE)
