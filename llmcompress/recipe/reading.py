"""YAML → checked `Recipe`; everything that can be known without the model is refused here, with its line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from llmcompress.errors import CompressError, ExitCode
from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.recipe.document import MAX_BYTES, Document, Path, read_document
from llmcompress.recipe.model import Recipe
from llmcompress.recipe.order import check_order_of_globs
from llmcompress.recipe.overrides import with_set
from llmcompress.recipe.problems import Problems, explain
from llmcompress.recipe.schema import SELECTORS, Schema, json_schema, nearest


def read_recipe(path: FilePath | str, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `settings` are `--set` texts such as `calibration.samples=16`.

    Raises: CompressError with line and fix.
    """
    path = FilePath(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise CompressError(
            "recipe.unreadable",
            f"cannot read the recipe: {problem.strerror}",
            where=str(path),
            fix="give a YAML file, or the name of a preset with --preset (see `llmcompress recipes ls`)",
            exit_code=ExitCode.USAGE,
        ) from None
    return parse_recipe(text, str(path), settings=settings)


def parse_recipe(text: str | bytes, where: str, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text; `where` names the text in errors.

    Raises: CompressError with line and fix.
    """
    schema = json_schema()
    return check_document(with_set(read_document(text, where), settings, schema), schema)


def check_document(document: Document, schema: Schema) -> Recipe:
    """A document as a recipe, every value checked against its type.

    Raises: CompressError for the first problem; it also lists the others.
    """
    problems = Problems()
    sections = {**document.data, "passes": []}
    recipe = None
    try:
        # as JSON and strict: lists may be tuples, but "4" is not 4 and 1 is not true
        recipe = Recipe.model_validate_json(json.dumps(sections), strict=True)
    except ValidationError as found:
        for error in found.errors():
            explain(problems, document, schema, error)
    passes = _read_passes(document, schema, problems)
    problems.raise_first()
    assert recipe is not None
    check_order_of_globs(passes, document)
    return recipe.model_copy(update={"passes": tuple(passes)})


def _read_passes(document: Document, schema: Schema, problems: Problems) -> list[Pass]:
    items = document.data.get("passes")
    if not isinstance(items, list):
        what = "`passes` is missing" if "passes" not in document.data else "`passes` must be a list"
        problems.add("recipe.passes", what, document.where(("passes",)), "write `passes:` and below it `  - rtn`")
        return []
    read = (_read_pass(item, ("passes", index), document, schema, problems) for index, item in enumerate(items))
    return [each for each in read if each is not None]


def _read_pass(item: Any, path: Path, document: Document, schema: Schema, problems: Problems) -> Pass | None:
    """One item of the list: `rtn` or `gptq: {scheme: int4_g128}`."""
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        what = "a pass is a name, or one name with its options"
        fix = "write each pass as its own item: `- gptq: {scheme: int4_g128}`"
        if isinstance(item, dict) and item and next(iter(item.values())) is None:
            fix = f"indent the options further than `{next(iter(item))}:`"
        problems.add("recipe.passes", what, document.where(path), fix)
        return None
    (name, options), names = next(iter(item.items())), list(PASSES)
    if name not in names:
        problems.add("recipe.unknown-pass", f"there is no pass {name!r}", document.where(path), nearest(name, names))
        return None
    path = (*path, name)
    if options is not None and not isinstance(options, dict):
        fix = f"write `- {name}: {{option: value}}`"
        problems.add("recipe.type", f"the options of {name} must be a mapping", document.where(path), fix)
        return None
    spelled = {
        key: [value] if key in ("sites", "exclude") and isinstance(value, str) else value
        for key, value in (options or {}).items()
    }
    found = _validated(PASSES[name], spelled, path, document, schema, problems)
    for glob, changed in (found.overrides if isinstance(found, BlockPass) else {}).items():
        _check_override(PASSES[name], spelled, (*path, "overrides", glob), changed, document, schema, problems)
    return found


def _validated(
    cls: type[Pass], options: dict[str, Any], path: Path, document: Document, schema: Schema, problems: Problems
) -> Pass | None:
    try:
        return cls.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as found:
        for error in found.errors():
            explain(problems, document, schema, error, path)
    return None


def _check_override(
    cls: type[Pass],
    options: dict[str, Any],
    path: Path,
    changed: dict[str, Any],
    document: Document,
    schema: Schema,
    problems: Problems,
) -> None:
    """The options of an override are options of the pass, and the pass is valid with them."""
    for key in SELECTORS:
        if key in changed:
            what = f"an override cannot change {key!r}: its glob already says where it applies"
            fix = f"remove `{key}`, or write a second pass"
            problems.add("recipe.override", what, document.where((*path, key)), fix)
    given = {**options, **{key: value for key, value in changed.items() if key not in SELECTORS}, "overrides": {}}
    _validated(cls, given, path, document, schema, problems)
