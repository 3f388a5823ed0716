"""What a recipe may say, as data: listed, explained and checked without importing PyTorch.

`catalogue.json` is written by `scripts/write_catalogue.py`, and a test compares it with the classes. It is used until
the passes are imported; after that the classes themselves are asked, a user's own passes included.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin

from pydantic import BaseModel

from llmcompress.recipe.document import Document
from llmcompress.recipe.overrides import with_set
from llmcompress.recipe.problems import validated
from llmcompress.recipe.schema import Schema
from llmcompress.recipe.stages import stages_of
from llmcompress.recipe.stand_ins import stand_in

if TYPE_CHECKING:
    from llmcompress.passes.base import Pass

FILE = Path(__file__).with_name("catalogue.json")


@dataclass(frozen=True)
class PassText:
    """What is said of a pass beside its options."""

    kind: str
    """The family: quantization, pruning, decomposition, dynamic."""
    description: str
    """Its docstring: what it does, the source, where it differs."""
    names: Mapping[str, list[str]]
    """Options that take a registered name, which no schema lists → the names."""

    @property
    def summary(self) -> str:
        """The first paragraph, in one line."""
        return self.description.split("\n\n")[0].replace("\n", " ")


@dataclass(frozen=True)
class Catalogue:
    """Every pass, and the JSON Schema of a recipe."""

    passes: Mapping[str, PassText]
    schema: Schema

    def options(self, name: str) -> dict[str, Schema]:
        """The schema of every option of a pass."""
        found: dict[str, Schema] = self.schema["properties"]["passes"]["items"]["anyOf"][0]["properties"][name]
        return dict(found["properties"])

    def checked(self, document: Document, settings: Sequence[str] = ()) -> Any:
        """The recipe with the fields of `Recipe`, None where it says nothing; checked as far as the schema tells.

        Raises: CompressError like `read_recipe`.
        """
        if settings:
            document = with_set(document, settings, stages_of(self._stand_in), self.schema)
        return validated(document, self._stand_in, lambda: self.schema)

    @cached_property
    def _stand_in(self) -> type[BaseModel]:
        return stand_in(self.schema)


def catalogue() -> Catalogue:
    """The one that was written, or what the imported classes say."""
    return catalogue_of_classes() if passes_are_imported() else written_catalogue()


def passes_are_imported() -> bool:
    """Whether asking the classes costs no import."""
    return "llmcompress.passes.base" in sys.modules


def written_catalogue() -> Catalogue:
    """The content of `catalogue.json`."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return Catalogue({name: PassText(**text) for name, text in data["passes"].items()}, data["schema"])


def catalogue_of_classes() -> Catalogue:
    """What the classes say; imports PyTorch."""
    from llmcompress.passes.base import PASSES
    from llmcompress.recipe.reading import json_schema

    texts = {
        name: PassText(_kind(PASSES[name]), inspect.cleandoc(PASSES[name].__doc__ or ""), _names(PASSES[name]))
        for name in PASSES
    }
    return Catalogue(texts, json_schema())


def as_json(found: Catalogue) -> str:
    """The text of `catalogue.json`."""
    passes = {name: asdict(text) for name, text in found.passes.items()}
    return json.dumps({"passes": passes, "schema": found.schema}, indent=1, ensure_ascii=False) + "\n"


def _names(cls: type[Pass]) -> dict[str, list[str]]:
    """By asking the class itself which it accepts."""
    from llmcompress.passes.base import PASSES
    from llmcompress.passes.pruning.scores.base import SCORES

    scores = {name: name for name in SCORES}
    candidates: dict[str, dict[str, Any]] = {
        "quantizer": {name: {name: {}} for name in PASSES},
        "score": scores,
        "prior": scores,
    }
    found = {
        option: [name for name, value in named.items() if _accepts(cls, option, value)]
        for option, named in candidates.items()
        if option in cls.model_fields and get_origin(cls.model_fields[option].annotation) is not Literal
    }
    return {option: names for option, names in found.items() if names}


def _accepts(cls: type[Pass], option: str, value: Any) -> bool:
    try:
        cls.model_validate({option: value})
    except ValueError:
        return False
    return True


def _kind(cls: type) -> str:
    """The folder below `passes`; a pass from elsewhere is named by its module."""
    parts = cls.__module__.split(".")
    return parts[2] if cls.__module__.startswith("llmcompress.passes.") else parts[0]
