"""YAML → checked `Recipe`; everything that can be checked without the model is checked here, with line numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TypeVar

from llmcompress.recipe.document import Document, read_document, read_file
from llmcompress.recipe.model import Recipe, json_schema
from llmcompress.recipe.order import check_order_of_globs
from llmcompress.recipe.overrides import with_set
from llmcompress.recipe.problems import validated
from llmcompress.recipe.stages import stages_of

R = TypeVar("R", bound=Recipe)


def read_recipe(path: FilePath | str, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `settings` are `--set` texts such as `calibration.samples=16`.

    Raises: CompressError with line and fix.
    """
    return check_document(read_file(FilePath(path)), Recipe, settings=settings)


def parse_recipe(text: str | bytes, where: str, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text; `where` names the text in errors.

    Raises: CompressError with line and fix.
    """
    return check_document(read_document(text, where), Recipe, settings=settings)


def check_document(document: Document, kind: type[R], *, settings: Sequence[str] = ()) -> R:
    """A document, changed by `--set` texts, as a recipe of that kind.

    Raises: CompressError for the first problem; it also lists the others.
    """
    if settings:
        document = with_set(document, settings, stages_of(kind), json_schema(kind))
    recipe = validated(document, kind, lambda: json_schema(kind))
    check_order_of_globs(recipe.passes, document)
    return recipe
