"""`Recipe`: the whole run as frozen data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmcompress.calibration.settings import Calibration, Guard
from llmcompress.elicitation.base import STEPS, DataStep
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, MetricSettings
from llmcompress.evaluation.settings.perplexity import BUNDLED_TEXT
from llmcompress.exporters.base import EXPORTERS, Exporter
from llmcompress.passes.base import PASSES, Pass
from llmcompress.publishing.destinations import DESTINATIONS, HubRepository
from llmcompress.recipe.checking import check_document, plain_data
from llmcompress.recipe.document import Document, read_document, read_json_object, write_yaml
from llmcompress.recipe.stages import Grouped, LeavesWeights, Listed, beside_weights


class Save(BaseModel):
    """How the result is saved."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["auto", "compressed-tensors", "plain", "llmcompress"] = "auto"
    """`auto`: compressed-tensors where that format can represent every site; `plain`: dequantized to ordinary weights;
    `llmcompress`: codes without padding, 3 bits in 3 bits, for loading after `import llmcompress`."""
    dtype: Literal["checkpoint", "bfloat16", "float16", "float32"] = "checkpoint"
    """Dtype of scales and of everything that stays dense; `checkpoint`: as in the source."""
    zero_points: Annotated[Literal["folded", "packed"], LeavesWeights()] = "folded"
    """Zero points of 2- and 4-bit asymmetric schemes. `folded` into codes of twice the width, which load everywhere;
    `packed` without padding, for runtimes that read packed zero points (docs/decisions/0004)."""
    max_shard_size: Annotated[str, LeavesWeights()] = Field(
        default="5GB", pattern=r"^[1-9][0-9]*(\.[0-9]+)? ?[KMGT]B$", examples=["5GB"]
    )
    """Maximum size of a weight file."""


class Recipe(BaseModel):
    """Everything a run depends on. Read one with `from_dict`, `from_yaml`, `from_json` or `read_recipe`.

    Fields are in the order in which a run uses them. A stage is one field, annotated with the registry of its items.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = Field(default=None, min_length=1)
    """Hub id, folder or `builtin:books-llama`; None: given beside the recipe."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, tag or branch of the Hub repository."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Dangerous: a Hub model needs its 40-digit commit as `revision`; for a
    local folder, the files that run are listed with their hashes."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Random seed: calibration windows, text sampled by `self`."""
    calibration: Calibration = Calibration()
    data: Annotated[tuple[DataStep, ...], Listed(STEPS)] = ()
    """Steps that make training examples, top to bottom, before the first pass; `recover`, `distill`, `qat` and
    `preference` learn from these instead of the calibration text. Samples have up to `calibration.tokens` tokens."""
    passes: Annotated[tuple[Pass, ...], Listed(PASSES)]
    """Passes, applied top to bottom inside each block."""
    guard: Guard = Guard()
    """Blocks are compared with their plain baseline, and the model with the dense one, on held-out windows."""
    evaluate: Annotated[tuple[MetricSettings, ...], Grouped(METRIC_SETTINGS), LeavesWeights()] = BUNDLED_TEXT
    """What is evaluated before and after; an empty mapping: nothing."""
    save: Save = Save()
    export: Annotated[tuple[Exporter, ...], Listed(EXPORTERS), LeavesWeights()] = ()  # limits change the passes instead
    """Targets for which the result is exported too, each into a folder beside the output (`OUTPUT-gguf`). Quantizers
    respect their limits, and what one of them cannot represent is refused before any work."""
    publish: Annotated[tuple[HubRepository, ...], Grouped(DESTINATIONS), LeavesWeights()] = ()
    """Where the finished folders are pushed: `hub: [USER/NAME]`. Login and rights are checked before any work."""

    @field_validator("passes")
    @classmethod
    def _at_least_one(cls, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        if not passes:
            raise CompressError(
                "recipe.no-passes",
                "`passes` is empty: there is nothing to do",
                fix="add at least one pass, such as `passes: [rtn]`; `llmcompress passes` lists them",
                exit_code=ExitCode.USAGE,
            )
        return passes

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe that a dictionary holds, checked like a file; `passes` may also be pass objects.

        Raises: CompressError naming the key and what to write instead.
        """
        return check_document(Document("recipe", plain_data(data)), cls)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The recipe in a YAML text.

        Raises: CompressError with line and fix.
        """
        return check_document(read_document(text, "recipe"), cls)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The recipe in a JSON text.

        Raises: CompressError for what is no JSON object or has a key twice, and as `from_dict` does.
        """
        return cls.from_dict(read_json_object(text))

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data, every default written out; `from_dict` reads it back to an equal one."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """The same as JSON text, for `from_json`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_yaml(self) -> str:
        """The same as YAML text, for `from_yaml` and for files."""
        return write_yaml(self.to_dict())

    def hash(self) -> str:
        """16 hexadecimal digits that change with everything that can change a weight, and nothing else."""
        return hash_of(self.to_dict(), type(self))

    def for_model(self, given: str | None) -> Recipe:
        """The same recipe for the model given beside it; None keeps the recipe's own.

        Raises: CompressError when there is no model, or when the recipe pins a revision of another one.
        """
        if given is None and self.model is None:
            raise CompressError(
                "recipe.no-model",
                "no model: none was given, and the recipe names none",
                fix="give the model as an argument, or set `model:` in the recipe",
                exit_code=ExitCode.USAGE,
            )
        if given is not None and self.revision is not None and self.model not in (None, given):
            raise CompressError(
                "recipe.other-model",
                f"the recipe pins revision {self.revision} of {self.model}, and {given} was given",
                fix="do not give a model, or remove `model` and `revision` from the recipe",
                exit_code=ExitCode.USAGE,
            )
        return self if given is None else self.model_copy(update={"model": given})


def hash_of(written: Mapping[str, Any], kind: type[Recipe] = Recipe) -> str:
    """`Recipe.hash` of a resolved recipe as data; of another version's, with the options of that version."""
    canonical = json.dumps(
        _without(written, beside_weights(kind)), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _without(data: Mapping[str, Any], left_out: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value, left_out[key]) if key in left_out else value
        for key, value in data.items()
        if left_out.get(key) is not True
    }
