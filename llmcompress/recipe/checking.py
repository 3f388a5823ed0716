"""A document, or plain Python data → a checked recipe; everything that can be checked without the model is checked
here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import BaseModel

from llmcompress.elicitation.base import STEPS, DataStep
from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.base import EXPORTERS, Exporter
from llmcompress.passes.base import PASSES, Pass
from llmcompress.recipe.document import MAX_DEPTH, Document
from llmcompress.recipe.order import check_order_of_globs
from llmcompress.recipe.overrides import with_set
from llmcompress.recipe.problems import validated
from llmcompress.recipe.schema import schema_of
from llmcompress.recipe.stages import stages_of

R = TypeVar("R", bound=BaseModel)


def check_document(document: Document, kind: type[R], *, settings: Sequence[str] = ()) -> R:
    """A document, changed by settings, as a recipe of that kind; every value is checked against its type.

    Raises: CompressError for the first problem; it also lists the others.
    """
    if settings:
        document = with_set(document, settings, stages_of(kind), schema_of(kind))
    recipe = validated(document, kind, lambda: schema_of(kind))
    check_order_of_globs(getattr(recipe, "passes", ()), document)
    return recipe


def plain_data(value: Any, *, where: str = "recipe", depth: int = 0) -> Any:
    """Python data in the form of a document: passes become name and options, tuples become lists, paths become strings.

    Raises: CompressError for values that a recipe cannot contain.
    """
    if depth > MAX_DEPTH:
        raise _refused(
            "recipe.too-large", f"the recipe is nested deeper than {MAX_DEPTH} levels", where, "reduce the nesting"
        )
    if isinstance(value, Pass):
        return {PASSES.name_of(type(value)): value.model_dump(mode="json")}
    if isinstance(value, Exporter):
        return {EXPORTERS.name_of(type(value)): value.model_dump(mode="json")}
    if isinstance(value, DataStep):
        return {STEPS.name_of(type(value)): value.model_dump(mode="json")}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, where=f"{where}.{key}", depth=depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, where=f"{where}.{index}", depth=depth + 1) for index, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    what = f"a recipe cannot hold {value!r:.80} ({type(value).__name__})"
    raise _refused("recipe.type", what, where, "use text, numbers, true or false, lists, mappings, or passes")


def _refused(code: str, what: str, where: str, fix: str) -> CompressError:
    return CompressError(code, what, where=where, fix=fix, exit_code=ExitCode.USAGE)
