"""Recipes from files and from text, and their JSON Schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath

from pydantic import BaseModel

from llmcompress.recipe.checking import check_document
from llmcompress.recipe.document import read_document, read_file
from llmcompress.recipe.model import Recipe
from llmcompress.recipe.schema import Schema, schema_of


def read_recipe(path: FilePath | str, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, YAML or JSON; `settings` are texts such as `calibration.samples=16`.

    Raises: CompressError with line and fix.
    """
    return check_document(read_file(FilePath(path)), Recipe, settings=settings)


def parse_recipe(text: str | bytes, where: str, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML or JSON text; `where` names the text in errors.

    Raises: CompressError with line and fix.
    """
    return check_document(read_document(text, where), Recipe, settings=settings)


def json_schema(kind: type[BaseModel] = Recipe) -> Schema:
    """A whole recipe for editors, with the options of everything that is registered."""
    return schema_of(kind)
