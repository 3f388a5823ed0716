"""`Recipe`: the whole run as frozen data."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmcompress.calibration.settings import Calibration
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.settings import BUNDLED_TEXT, TASKS, PerplexityTask
from llmcompress.passes.base import PASSES, Pass
from llmcompress.recipe.document import write_yaml
from llmcompress.recipe.stages import Grouped, LeavesWeights, Listed, beside_weights


class Save(BaseModel):
    """How the result is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["auto", "compressed-tensors", "plain", "llmcompress"] = "auto"
    """`auto`: compressed-tensors where that format holds every site; `plain`: multiplied out to ordinary weights;
    `llmcompress`: every code at its own width, 3 bits in 3 bits, for loading after `import llmcompress`."""
    dtype: Literal["checkpoint", "bfloat16", "float16", "float32"] = "checkpoint"
    """Of scales and of all that stays dense; `checkpoint`: as it was read."""
    zero_points: Annotated[Literal["folded", "packed"], LeavesWeights()] = "folded"
    """Of 2- and 4-bit asymmetric grids. `folded` into the codes, whose fields are then twice as wide: loads everywhere;
    `packed`: as small as the grid says, for runtimes that read packed zero points (docs/decisions/0004)."""
    max_shard_size: Annotated[str, LeavesWeights()] = Field(
        default="5GB", pattern=r"^[1-9][0-9]*(\.[0-9]+)? ?[KMGT]B$", examples=["5GB"]
    )
    """Largest weight file."""


class Recipe(BaseModel):
    """Everything a run depends on. Read it with `read_recipe`, `parse_recipe` or `load_preset`.

    Fields stand in the order in which a run uses them. A stage is one field with the registry of what may stand in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = Field(default=None, min_length=1)
    """Hub id, folder or `builtin:books-llama`; None: given on the command line."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, tag or branch of the Hub repository."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Dangerous; a Hub model needs its 40-digit commit as `revision`, and of
    a local folder the files that run are named with their hashes."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of everything random: which calibration windows, what `self` samples."""
    calibration: Calibration = Calibration()
    passes: Annotated[tuple[Pass, ...], Listed(PASSES)]
    """Top to bottom inside each block."""
    evaluate: Annotated[tuple[PerplexityTask, ...], Grouped(TASKS), LeavesWeights()] = BUNDLED_TEXT
    """What is measured before and after; an empty mapping measures nothing."""
    save: Save = Save()

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

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `parse_recipe` reads it back to an equal recipe."""
        return write_yaml(self.model_dump(mode="json"))

    def hash(self) -> str:
        """16 hexadecimal digits that change with what can change a weight, and with nothing else."""
        facts = self.model_dump(mode="json", exclude=beside_weights(type(self)))
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def for_model(self, given: str | None) -> Recipe:
        """The same recipe for the model given on the command line; None keeps the recipe's own.

        Raises: CompressError when there is no model, or when the recipe pins a revision of another one.
        """
        if given is None and self.model is None:
            raise CompressError(
                "recipe.no-model",
                "no model: neither the command nor the recipe names one",
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
