"""`Space`: what a search may decide, as plain data. Every choice names ordinary passes with ordinary options.

sites:    what happens to linears:              {dense: [], int4: [{gptq: {scheme: int4_g64}}], ...}
bodies:   what happens to the shapes of a block: {whole: [], ffn-75: [{width: {fraction: 0.25, heads: false}}]}
before:   one choice for the whole model, first: {none: [], sliced: [{slicegpt: {fraction: 0.1}}]}
after:    one choice for the whole model, last:  {none: [], healed: [{distill: {...}}]}
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.recipe.stages import Listed

Passes = Annotated[tuple[Pass, ...], Listed(PASSES)]
Choices = dict[str, Passes]
"""Name of a choice → its passes, in the order of a recipe; none: nothing happens."""

DROPPED = "dropped"
"""The body of a block that is left out."""

UNTOUCHED = "none"


class Space(BaseModel):
    """What may be decided, for any model; `PlanSpace` applies it to one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sites: Choices
    """Choices for linears. The first is the one that a part has which is left out of all decisions."""
    per: Literal["site", "group", "block"] = "group"
    """What decides for itself: every linear; linears that share an input (q, k, v; gate, up); whole blocks."""
    bodies: Choices = {"whole": ()}
    """Choices for the shapes of a block: passes that remove channels or heads. The first must have no passes."""
    most_dropped: float = Field(default=0.0, ge=0, lt=1)
    """At most this fraction of the blocks may be dropped; 0: none."""
    before: Choices = {UNTOUCHED: ()}
    """Choices for the whole model that come before everything else, such as a rotation or a narrower hidden state."""
    after: Choices = {UNTOUCHED: ()}
    """Choices for the whole model that come last, such as rounding the embedding, or healing."""
    period: int | None = Field(default=None, ge=1)
    """One plan for so many blocks, repeated over the model, as cells are in architecture search; None: each block has
    its own."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, choices in (("sites", self.sites), ("bodies", self.bodies)):
            if not choices:
                raise ValueError(f"`{name}` must name at least one choice")
            for choice, passes in choices.items():
                wrong = [PASSES.name_of(type(each)) for each in passes if not isinstance(each, BlockPass)]
                if wrong:
                    raise ValueError(
                        f"`{wrong[0]}` works on the whole model: put it in `before` or `after`, not in "
                        f"`{name}: {choice}`"
                    )
        if DROPPED in self.bodies:
            raise ValueError(f"`{DROPPED}` is the body of a block that is left out: set `most_dropped` instead")
        if next(iter(self.bodies.values())):
            raise ValueError("the first of `bodies` must have no passes: the block as it is")
        for choice, passes in self.sites.items():
            if any(isinstance(each, BlockPass) and "shapes" in each.traits() for each in passes):
                raise ValueError(f"`sites: {choice}` changes the shapes of a block: put it in `bodies`")
        return self
