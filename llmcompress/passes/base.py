"""Base classes of compression algorithms: a frozen set of options and one method that works on a block or a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.formats.named import Kind
from llmcompress.model.map import BlockInfo, ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.globs import matches
from llmcompress.records.rows import SiteReport
from llmcompress.registry import Registry

Trait = Literal["codes", "zeros", "pattern", "factors", "shapes", "dynamic", "cache", "ranges", "tables"]
"""What a pass leaves behind: quantized weights, zeros, N:M zeros, low-rank factors, fewer rows and columns, dynamic
modules, a quantized KV cache, static activation ranges, an embedding or output head that is not an ordinary table any
more."""

NOTHING: Mapping[Trait, str] = MappingProxyType({})


class Backward(NamedTuple):
    """What gradients of the loss through the whole model need, for the resource estimate."""

    copies: float = 0.0
    """Besides the model, in float32: copies of the selected sites' weights."""
    of_all: float = 0.0
    """Copies of all parameters: their gradients, and the optimizer's state."""
    windows: int | None = None
    """Windows in one batch, if their logits are not too large; None: as many as for calibration."""
    trained_on: int = 0
    """Windows seen in training, repetitions included; 0: no training, every window is seen once."""
    recomputes: bool = False
    """Whether blocks run again when their gradients are due, as in `sensitivity.gradients`: one more forward, and only
    the states between blocks are kept meanwhile."""
    lowered: bool = False
    """Whether a training computes in bfloat16 or float16."""


class Pass(BaseModel, ABC):
    """One algorithm. The fields are exactly the options that a recipe may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    leaves: ClassVar[frozenset[Trait]] = frozenset()
    """Traits of its sites afterwards."""

    conflicts: ClassVar[Mapping[Trait, str]] = NOTHING
    """Traits from earlier passes on the same site that it would undo, each with the reason for the error message."""

    keeps_codes: ClassVar[bool] = False
    """Whether it may work on quantized sites, because it does not change weights."""

    learns_from_examples: ClassVar[bool] = False
    needs_examples: ClassVar[bool] = False
    """Whether it trains on what the recipe's `data` steps made where there are any, and whether it must."""

    whole_block: ClassVar[frozenset[str]] = frozenset()
    """Options of a block as a whole, which `overrides` for individual sites cannot change."""

    decides: ClassVar[bool] = False
    """Whether `decide` must see the whole model before anything is changed."""

    def selects(self, site: str) -> bool:
        """Whether this pass works on the site with that full name; by default on all."""
        return True

    def for_site(self, site: str) -> Self:
        """The same pass with the overrides that match the site applied."""
        return self

    def traits(self) -> frozenset[Trait]:
        """Traits of its sites afterwards, with these options."""
        return self.leaves

    def for_model(self, model_map: ModelMap) -> Self:
        """The same pass with what it finds in the model filled in, for `names_after`."""
        return self

    def names_after(self, site: str) -> tuple[str, ...]:
        """Full names of the linears at this site afterwards: factors have their own names."""
        return (site,)

    def needs_plugin(self) -> bool:
        """Whether it leaves modules of ours beside codes, so that no stock format can hold the model."""
        return not {"factors", "dynamic"}.isdisjoint(self.traits())

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """The approximate fraction of a site's parameters that is kept, as far as the options tell."""
        return 1.0

    def site_tensors(self, site: str, info: SiteInfo, found: Mapping[str, Kind], dtype: torch.dtype) -> dict[str, Kind]:
        """What the files hold of a site afterwards, by name within it, given what they would hold without it."""
        return dict(found)

    def tensors_outside(self, tensors: Mapping[str, Kind], model_map: ModelMap, dtype: torch.dtype) -> dict[str, Kind]:
        """What the files hold afterwards beside the linears of blocks, by full name, as far as the options tell."""
        return dict(tensors)

    def head_scheme(self, scheme: str | None, model_map: ModelMap) -> str | None:
        """The scheme of the output head afterwards, given what it was before; None: an ordinary matrix."""
        return scheme

    def rounds_embedding(self) -> Scheme | None:
        """Of which scheme the embedding holds codes afterwards; None: of none."""
        return None

    def is_optional(self) -> bool:
        """Whether it is left out where the target or the memory has no room for it."""
        return False

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
        """The same for the combination of traits on one site, if no single trait conflicts."""
        return None

    def check(self, model_map: ModelMap) -> None:
        """Check that it can work on all selected sites of that model, before any of them is changed.

        Raises: CompressError when it cannot.
        """

    def rotates_stream(self) -> bool:
        """Whether it gives the residual stream another basis, which not every architecture allows."""
        return False

    def notes(self, model_map: ModelMap) -> list[str]:
        """What it does otherwise than its options say, because this model asks for it: told before the work."""
        return []

    def check_packages(self) -> None:
        """Check that the optional packages it needs are installed, for all passes before any work.

        Raises: CompressError saying how to install them.
        """

    def quantizes(self) -> bool:
        """Whether the sites are quantized afterwards, with these options."""
        return "codes" in self.traits()

    @abstractmethod
    def uses_data(self) -> bool:
        """Whether calibration windows are needed."""

    def teachers(self) -> tuple[str, ...]:
        """Models that it learns from: `original`, Hub ids or folders. Their tokenizers are compared before any work."""
        return ()

    def maps_vocabulary(self) -> bool:
        """Whether its teachers may have another tokenizer than the model."""
        return False

    def streams(self) -> bool:
        """Whether it needs only one block in memory, so that weights can be offloaded to disk."""
        return False

    def backward(self) -> Backward | None:
        """What it needs for gradients of the loss through the whole model; None if it computes none."""
        return None

    def forwards_through_model(self, blocks: int) -> tuple[float, float]:
        """About how often all windows go through all blocks, and through the head, beside gradients and `forwards`."""
        return 0.0, 0.0

    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """Decisions that need the whole model. Saved, so that a resumed run does not repeat them.

        Must leave the model unchanged.
        """
        return {}

    def with_decisions(self, decisions: Mapping[str, Tensor]) -> Pass | None:
        """An equivalent pass with the decisions as ordinary options; `decisions` is the result of `decide`.

        None if no option can represent them, such as a mask over individual weights.
        """
        return None

    def pools(self) -> bool:
        """Whether several processes can share its windows: it uses only statistics that sum over tokens."""
        return self.streams()


class BlockPass(Pass):
    """An algorithm that works block by block; each block sees the outputs of the compressed blocks before it.

    What `decide` returned is in `block.decisions`.

    `sites`, `exclude` and the keys of `overrides` are globs on full module names (`*.down_proj`; `*.down_proj|*.fc2`
    matches either); an override changes options for the sites it matches, and the last match wins.
    """

    changes_sites: ClassVar[bool] = False
    """Whether it replaces a block's linears, so that later passes need a new map."""

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
        return matches(site, *self.sites) and not matches(site, *self.exclude)

    def for_site(self, site: str) -> Self:
        """The same pass with the overrides that match the site applied."""
        changed = {
            option: value
            for glob, options in self.overrides.items()
            if matches(site, glob)
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
        """The same pass with changed options, and with options of individual sites, which win over all overrides.

        The options in `dropped` are removed from all other overrides.
        """
        overrides = {
            glob: left
            for glob, options in self.overrides.items()
            if glob not in of_site
            and (left := {option: value for option, value in options.items() if option not in dropped})
        }
        for site, options in of_site.items():
            # the site's name may be a glob of an earlier override, and stands last now: it says what held in the end
            here, old = self.for_site(site), self.overrides.get(site, {})
            overrides[site] = {option: getattr(here, option) for option in old if option not in dropped} | dict(options)
        return type(self)(**{**self.model_dump(), **changed, "overrides": overrides})

    def uses_data(self) -> bool:
        """Whether anything is measured; a pass that allocates by data overrides this."""
        return bool(self.needs())

    @abstractmethod
    def needs(self) -> tuple[type[Statistic], ...]:
        """Which statistics of the inputs `apply` reads; empty for a pass that needs no data."""

    def measures(self) -> tuple[type[Statistic], ...]:
        """All statistics measured on the selected sites; more than `needs` if `apply` measures by itself."""
        return self.needs()

    def forwards(self) -> int:
        """About how often all windows pass through a block besides feeding the next one, for the resource estimate."""
        return 1 if self.needs() else 0

    def trained_windows(self) -> int:
        """Windows per block that gradients are computed for, repetitions included, for the resource estimate."""
        return 0

    def wants_dense(self) -> bool:
        """Whether `apply` reads `block.dense_outputs`: one more forward, and the memory of the hidden states again."""
        return False

    def block_after(self, block: BlockInfo) -> BlockInfo | None:
        """The block with the sizes that its linears will have; None: data decide."""
        return None if "shapes" in self.traits() else block

    def plain(self) -> Sequence[BlockPass] | None:
        """The baseline of this pass: passes that leave the same traits without data. None where there is none.

        Not asked of a pass that leaves no traits, or before it decided.
        """
        return None

    def streams(self) -> bool:
        """True unless it changes the blocks' linears; a pass that needs the whole model to decide overrides this."""
        return not self.changes_sites

    @abstractmethod
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Compress the given, already measured sites of one block; returns one report row per changed site."""

    def run(self, block: BlockWork) -> list[SiteReport]:
        """Measure the selected sites, apply the pass, drop the statistics."""
        sites = [site for site in block.sites if self.selects(site.name)]
        if not sites:
            return []
        if self.needs():
            block.measure(sites, self.needs())
        rows = self.apply(block, sites)
        block.forget()
        return rows


class ModelPass(Pass):
    """An algorithm that needs the whole model at once, for example to remove blocks or rotate the residual stream.

    Its result is saved in the run folder. An interrupted one starts again with the same `whole.decisions`; its
    trainings resume from their last saved state.
    """

    @abstractmethod
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Change the model in place, or pass a new one to `whole.replace_model`; returns rows of changed sites."""


PASSES: Registry[Pass] = Registry("pass", "llmcompress.passes")
