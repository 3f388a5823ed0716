"""YAML → checked `Recipe`; everything that can be checked without the model is checked here, with line numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TypeVar

from pydantic import ValidationError

from llmcompress.errors import CompressError, ExitCode
from llmcompress.recipe.document import MAX_BYTES, Document, read_document
from llmcompress.recipe.model import Recipe
from llmcompress.recipe.order import check_order_of_globs
from llmcompress.recipe.overrides import with_set
from llmcompress.recipe.problems import Problems, explain
from llmcompress.recipe.schema import json_schema
from llmcompress.recipe.stages import stages_of

R = TypeVar("R", bound=Recipe)


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
    return check_document(read_document(text, where), Recipe, settings=settings)


def check_document(document: Document, kind: type[R], *, settings: Sequence[str] = ()) -> R:
    """A document, changed by `--set` texts, as a recipe of that kind; every value is checked against its type.

    Raises: CompressError for the first problem; it also lists the others.
    """
    if settings:
        document = with_set(document, settings, stages_of(kind), json_schema(kind))
    try:
        # as JSON and strict: lists may be tuples, but "4" is not 4 and 1 is not true
        recipe = kind.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as found:
        problems, schema = Problems(), json_schema(kind)
        for error in found.errors():
            explain(problems, document, schema, error)
        raise problems.first() from None
    check_order_of_globs(recipe.passes, document)
    return recipe
