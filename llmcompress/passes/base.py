"""What a compression algorithm is: a frozen set of options, and one method that works on a block or a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.numerics.statistics import Statistic
from llmcompress.records.rows import SiteReport
from llmcompress.registry import Registry

Trait = Literal["codes", "zeros", "pattern", "factors", "shapes", "dynamic", "cache", "ranges", "tables"]
"""What a pass leaves behind: integer codes, exact zeros, N:M zeros, low-rank factors, fewer rows and columns, modules
that decide per input what they compute, keys and values cached as codes, inputs rounded on fixed ranges, an embedding
or head that is no table of numbers any more."""

NOTHING: Mapping[Trait, str] = MappingProxyType({})


class Backward(NamedTuple):
    """Gradients of the loss through the whole model: what foresight must know of them."""

    copies: float = 0.0
    """Beside the model, in float32: of the selected sites' weights."""
    of_all: float = 0.0
    """Of all parameters: their gradients, and what an optimizer keeps of them."""
    windows: int | None = None
    """In one batch, if their logits are not too large; None: as many as for calibration."""
    trained_on: int = 0
    """Windows that a training sees, repeated ones counted again; 0: no training, every window is seen once."""


class Pass(BaseModel, ABC):
    """One algorithm. The fields are exactly the options that a recipe may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    leaves: ClassVar[frozenset[Trait]] = frozenset()
    """Traits of what it works on, afterwards."""

    conflicts: ClassVar[Mapping[Trait, str]] = NOTHING
    """Traits of an earlier pass on the same site that it would undo, each with the reason told to the user."""

    keeps_codes: ClassVar[bool] = False
    """Whether it may work on sites that hold codes already: it does not change weights."""

    whole_block: ClassVar[frozenset[str]] = frozenset()
    """Options that concern a block as a whole, so that `overrides` for single sites cannot change them."""

    decides: ClassVar[bool] = False
    """Whether `decide` must see the whole model before any of it is touched."""

    def selects(self, site: str) -> bool:
        """Whether this pass works on the site with that full name; by default on all."""
        return True

    def for_site(self, site: str) -> Self:
        """The same pass with the overrides that match the site applied."""
        return self

    def traits(self) -> frozenset[Trait]:
        """What sites have afterwards, with these options."""
        return self.leaves

    def for_model(self, model_map: ModelMap) -> Self:
        """The same pass with what it finds in the model written out: `names_after` then speaks of those names."""
        return self

    def names_after(self, site: str) -> tuple[str, ...]:
        """Full names of the linears that stand there afterwards: factors have names of their own."""
        return (site,)

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """About which share of a site's parameters is left, as far as the options tell before any work."""
        return 1.0

    def conflict_with(self, trait: Trait) -> str | None:
        """Why this pass may not follow one that left that trait on the same site; None when it may."""
        if trait == "codes" and not self.keeps_codes:
            return "would change weights that are already quantized"
        if trait == "dynamic":
            return "needs blocks that run in full for every input; passes for dynamic inference must come last"
        if trait == "ranges" and not (self.quantizes() or self.keeps_codes):
            return "would change inputs that have static quantization ranges"
        if trait == "cache":
            return "needs the original attention; quantizing the KV cache must come last"
        return self.conflicts.get(trait)

    def conflict_with_all(self, traits: frozenset[Trait]) -> str | None:
        """The same for all that earlier passes left on one site, where no single trait is in the way."""
        return None

    def check(self, model_map: ModelMap) -> None:
        """Whether it can work on all selected sites of that model, asked before any of them is touched.

        Raises: CompressError when it cannot.
        """

    def check_packages(self) -> None:
        """Whether the optional packages that it needs are there, asked of all passes before any work.

        Raises: CompressError saying how to install them.
        """

    def quantizes(self) -> bool:
        """Whether the sites hold codes afterwards, with these options."""
        return "codes" in self.traits()

    @abstractmethod
    def uses_data(self) -> bool:
        """Whether calibration windows are needed."""

    def streams(self) -> bool:
        """Whether it never needs more than one block in memory, so that the weights may stay on disk."""
        return False

    def backward(self) -> Backward | None:
        """What it holds while it takes gradients of the loss through the whole model; None when it takes none."""
        return None

    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """What must be known of all blocks before one is touched. Kept, so that a killed run does not repeat it.

        The model must be as it was when this returns.
        """
        return {}

    def with_decisions(self, decisions: Mapping[str, Tensor]) -> Pass | None:
        """A pass that does the same by ordinary options and decides nothing; `decisions` are what `decide` gave.

        None where no option holds what was decided: a mask over single weights.
        """
        return None

    def pools(self) -> bool:
        """Whether several processes may share its windows: it reads nothing but sums over tokens."""
        return self.streams()


class BlockPass(Pass):
    """An algorithm that works on one block after the other, each as the model with all earlier blocks done sees it.

    What `decide` gave is there as `block.decisions`.

    `sites`, `exclude` and the keys of `overrides` are globs on full module names (`*.down_proj`); an override
    changes options for the sites it matches, the last match wins.
    """

    changes_sites: ClassVar[bool] = False
    """Whether a block's linears are others afterwards, so that later passes need a new map."""

    sites: tuple[str, ...] = Field(("*",), description="globs of the module names to compress")
    exclude: tuple[str, ...] = Field((), description="globs of the module names to skip")
    new_stage: bool = Field(
        False,
        description="start only when the earlier passes have finished all blocks, instead of following them block by "
        "block; passes that allocate always do",
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="different options for some sites, by glob"
    )

    @field_validator("sites", "exclude", mode="before")
    @classmethod
    def _one_glob(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("overrides")
    @classmethod
    def _only_site_options(cls, overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for glob, options in overrides.items():
            wrong = sorted((cls.whole_block | {"new_stage"}) & options.keys())
            if wrong:
                raise ValueError(f"{wrong[0]!r} cannot be overridden per site (override of {glob!r})")
        return overrides

    def selects(self, site: str) -> bool:
        """Whether this pass works on the site with that full name."""
        return _matches(site, self.sites) and not _matches(site, self.exclude)

    def for_site(self, site: str) -> Self:
        """The same pass with the overrides that match the site applied."""
        changed = {
            option: value
            for glob, options in self.overrides.items()
            if fnmatchcase(site, glob)
            for option, value in options.items()
        }
        return type(self)(**{**self.model_dump(), **changed, "overrides": {}}) if changed else self

    def with_site_options(
        self,
        changed: Mapping[str, Any],
        of_site: Mapping[str, Mapping[str, Any]],
        *,
        dropped: frozenset[str] = frozenset(),
    ) -> Self:
        """The same pass with other options, and for each named site some of its own, which win over all overrides.

        No other override says anything of the options in `dropped`.
        """
        others = {glob: options for glob, options in self.overrides.items() if glob not in of_site}
        overrides = {
            glob: left
            for glob, options in others.items()
            if (left := {option: value for option, value in options.items() if option not in dropped})
        }
        for site, options in of_site.items():
            # the site's name may be a glob of an earlier override, and stands last now: it says what held in the end
            here, old = self.for_site(site), self.overrides.get(site, {})
            overrides[site] = {option: getattr(here, option) for option in old if option not in dropped} | dict(options)
        return type(self)(**{**self.model_dump(), **changed, "overrides": overrides})

    def uses_data(self) -> bool:
        """Whether anything is measured; a pass that decides by data overrides this."""
        return bool(self.needs())

    @abstractmethod
    def needs(self) -> tuple[type[Statistic], ...]:
        """Which statistics of the inputs `apply` reads; empty for a pass that needs no data."""

    def measures(self) -> tuple[type[Statistic], ...]:
        """What is measured of the selected sites at any time; more than `needs` where `apply` measures by itself."""
        return self.needs()

    def forwards(self) -> int:
        """About how often all windows go through a block, beside the once that feeds the next one: for foresight."""
        return 1 if self.needs() else 0

    def wants_dense(self) -> bool:
        """Whether `apply` reads `block.dense_outputs`: one more forward, and as much memory as the hidden states."""
        return False

    def streams(self) -> bool:
        """Yes, unless the blocks become others; a pass that decides with the whole model resident overrides this."""
        return not self.changes_sites

    @abstractmethod
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Compress the given sites of one block, already measured; one report row per site touched."""

    def run(self, block: BlockWork) -> list[SiteReport]:
        """Measure what is needed on the selected sites, apply, forget."""
        sites = [site for site in block.sites if self.selects(site.name)]
        if not sites:
            return []
        if self.needs():
            block.measure(sites, self.needs())
        rows = self.apply(block, sites)
        block.forget()
        return rows


class ModelPass(Pass):
    """An algorithm that must work on the whole model at once: blocks are dropped, the residual stream is rotated.

    What it leaves is kept in the run folder when it is done. A killed one starts again, with `whole.decisions` as they
    were; its trainings go on where they were saved last.
    """

    @abstractmethod
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Change the model in place, or give `whole.replace_model` another; rows for what was touched."""


def _matches(site: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(site, glob) for glob in globs)


PASSES: Registry[Pass] = Registry("pass", "llmcompress.passes")
