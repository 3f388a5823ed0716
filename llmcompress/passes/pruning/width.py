"""Width pruning: removes FFN channels and whole heads, rows and columns together, and compensates in the remaining
weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import BlockInfo, ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.model.slices import cut_structure, cuts
from llmcompress.model.units import UnitGroup, groups_of, kept_fraction, unit_groups
from llmcompress.numerics import index_ranges
from llmcompress.numerics.refit import Refitted
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import PASSES, Backward, BlockPass, Pass, Trait
from llmcompress.passes.pruning.allocation import ALLOCATIONS, Request, balanced, kept_units
from llmcompress.passes.pruning.refits import REFITS, RefitName
from llmcompress.passes.pruning.scores.base import SCORES, Allocate, Score
from llmcompress.passes.pruning.width_rows import rows_of_smaller
from llmcompress.records.rows import SiteReport

_AFTER_THE_CHOICE = ("channels", "heads", "refit", "damping", "sites", "exclude", "overrides")
_CHOICE = frozenset({"fraction", "removed", "floor", "round_to"})
"""Options that say what is done with the units that go, and those that say which ones."""

_FIXED = (
    "width: the heads stay, because this model counts them outside of its blocks too; `fraction` is that of the FFN "
    "channels"
)

_AS_ASKED = 0.02
"""How far the removed fraction of heads may be from `fraction` without a note."""


class WidthPass(BlockPass):
    """What all passes that remove units share: which, how many, from where, and the compensation.

    A unit is an FFN channel or a head; where query heads share keys and values, the whole group of them.
    """

    decides: ClassVar[bool] = True
    changes_sites: ClassVar[bool] = True
    leaves: ClassVar[frozenset[Trait]] = frozenset({"shapes"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "pattern": "would shift the columns of N:M groups",
        "factors": "cannot remove rows and columns of low-rank factors",
    }
    whole_block: ClassVar[frozenset[str]] = frozenset({"channels", "heads", "allocation"})

    fraction: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="fraction of the parameters of heads and channels to remove; where whole heads cannot match "
        "it, uniformly allocated channels do",
    )
    removed: str | None = Field(
        None,
        pattern=index_ranges.PATTERN,
        description="instead: indices of the channels or heads to remove, e.g. 0-3, 7; in an override "
        "for the site that reads them (down_proj, o_proj)",
    )
    channels: bool = Field(True, description="remove FFN channels")
    heads: bool = Field(True, description="remove attention heads, whole key-value groups at a time")
    allocation: Literal["uniform", "global"] = Field(
        "uniform",
        description="uniform: the same number in every layer, so a plain config can represent the result; "
        "global: the least important units of the whole model",
    )
    floor: float = Field(0.25, ge=0, le=1, description="minimum fraction of units to keep in each layer")
    round_to: int = Field(1, ge=1, description="keep a multiple of this many channels")
    refit: RefitName = Field(
        "columns",
        description="compensation in the site that reads the units: columns (least-squares refit of its weights), "
        "scales (one factor per unit), bias (mean of the removed units), none",
    )
    damping: float = Field(0.01, gt=0, le=1, description="ridge of the refit, as a fraction of the mean diagonal")

    @abstractmethod
    def choose(self, whole: WholeModel, groups: Sequence[UnitGroup], requests: Sequence[Request]) -> list[Tensor]:
        """True for the units that stay, for every group."""

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing at once: heads and channels are measured one after the other, in `apply`."""
        return ()

    @override
    def measures(self) -> tuple[type[Statistic], ...]:
        return (Gram,) if self.refit == "columns" else ()

    @override
    def forwards(self) -> int:
        return (self.heads + self.channels) * (self.refit != "none")

    @override
    def uses_data(self) -> bool:
        """Heads always need some: how attention counts them is found by running the block."""
        refits = {self.refit, *(options["refit"] for options in self.overrides.values() if "refit" in options)}
        return self.heads or refits != {"none"}

    @override
    def check(self, model_map: ModelMap) -> None:
        requests = self._requests(self._groups(unit_groups(model_map)))
        if not requests:
            raise CompressError(
                "width.nothing-to-remove",
                "no selected site has units that can be removed",
                fix="select all sites of a unit (gate, up and down; or q, k, v and o); attention with a single "
                "key-value head has no units, and none can go where the model counts heads outside of its blocks; "
                "`llmcompress inspect` lists them",
                exit_code=ExitCode.USAGE,
            )
        for group in self._chosen(unit_groups(model_map)):
            self._check_given(group)
        asked = [request for request in requests if request.fraction > 0]
        if self.allocation == "uniform" and asked and all(kept_units(each) == each.group.units for each in asked):
            units = sorted({request.group.units for request in asked})
            raise CompressError(
                "width.rounded-away",
                f"`fraction` rounds to no units at all (multiples of {self.round_to} must stay)",
                where=f"groups of {', '.join(map(str, units))} units",
                fix="lower `round_to` or raise `fraction`",
                exit_code=ExitCode.USAGE,
            )

    @override
    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """Exact where all layers lose as much."""
        block = next(block for block in model_map.blocks if site.startswith(f"{block.name}."))
        groups = self._groups(groups_of(block))
        asked = {request.group: request for request in self._requests(groups)}

        def removed(group: UnitGroup) -> float:
            gone = self._given(group)
            return (group.units - kept_units(asked[group]) if gone is None else len(gone)) / group.units

        return kept_fraction(groups, site, removed)

    @override
    def block_after(self, block: BlockInfo) -> BlockInfo | None:
        """Every unit of a group is as large as the others, so how many go is all that counts."""
        if self.allocation != "uniform":
            return None
        groups = self._groups(groups_of(block))
        keep = {each.group.index: range(kept_units(each)) for each in self._requests(groups)}
        for group in groups:
            if (gone := self._given(group)) is not None:
                keep[group.index] = range(group.units - len(gone))
        structure = block.structure
        return replace(block, structure=cut_structure(structure, cuts(structure, keep), keep))

    @override
    def notes(self, model_map: ModelMap) -> list[str]:
        """Where whole heads cannot be the fraction asked for: what goes of heads, of channels and in all."""
        found = [_FIXED] if any(group.fixed for group in self._chosen(unit_groups(model_map))) else []
        if self.allocation == "uniform":
            found += [note for block in model_map.blocks if (note := self._note(block))]
        return list(dict.fromkeys(found))

    def _note(self, block: BlockInfo) -> str | None:
        requests = [each for each in self._requests(self._groups(groups_of(block))) if self._given(each.group) is None]
        gone = {each.group: each.group.units - kept_units(each) for each in requests}
        heads = [group for group in gone if group.kind == "heads"]
        wanted = {group: self.for_site(group.name).fraction for group in gone}
        if all(abs(gone[group] / group.units - wanted[group]) < _AS_ASKED for group in heads):
            return None
        said = [f"{gone[group]} of {group.units} groups of heads go, which go whole" for group in heads]
        said += [f"{gone[group] / group.units:.1%} of the FFN channels" for group in gone if group.kind == "channels"]
        removed = sum(count * group.parameters for group, count in gone.items())
        share = removed / sum(group.units * group.parameters for group in gone)
        fraction = " or ".join(f"{each:.0%}" for each in sorted(set(wanted.values())))
        return f"width, {fraction} asked for: {', '.join(said)}; {share:.1%} of their parameters in all"

    @override
    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        groups = self._groups(unit_groups(whole.map))
        given = {
            group.name: torch.tensor(gone, dtype=torch.long)
            for group in groups
            if (gone := self._given(group)) is not None
        }
        requests = self._requests(groups)
        asked = [
            (group, request)
            for group, request in zip(groups, requests, strict=True)
            if request.fraction > 0 and (self.allocation == "global" or kept_units(request) < group.units)
        ]
        if not asked:
            return given
        groups = [group for group, _ in asked]
        keep = self.choose(whole, groups, [request for _, request in asked])
        return given | {
            group.name: (~kept_U).nonzero().flatten().cpu() for group, kept_U in zip(groups, keep, strict=True)
        }

    @override
    def with_decisions(self, decisions: Mapping[str, Tensor]) -> Pass | None:
        """`width` with the units that go written out, whatever chose them."""
        common = self.model_dump(include=set(_AFTER_THE_CHOICE))
        gone = {name: {"removed": index_ranges.written(units.tolist())} for name, units in decisions.items()}
        return Width(**common).with_site_options({"fraction": 0.0}, gone, dropped=_CHOICE)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Cut the units off, refit what read them, then take their rows and columns out."""
        kept = {
            group: torch.tensor(sorted(set(range(group.units)) - set(gone.tolist())))
            for group in groups_of(block.info)
            if (gone := block.decisions.get(group.name)) is not None and len(gone)
        }
        if not kept:
            return []
        refitted: dict[str, Refitted] = {}
        # heads first: the FFN behind them is refitted on what it gets once they are gone
        for kind in ("heads", "channels"):
            refitted |= self._cut_off(block, {group: units for group, units in kept.items() if group.kind == kind})
        rows = rows_of_smaller(PASSES.name_of(type(self)), block, kept, refitted)
        block.shrink({group.index: units.tolist() for group, units in kept.items()})
        return rows

    def _groups(self, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
        """Of those chosen, the groups of which some units can go."""
        return [group for group in self._chosen(groups) if not group.fixed]

    def _chosen(self, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
        """The groups of the wanted kinds all of whose sites are selected."""
        wanted = {"channels": self.channels, "heads": self.heads}
        return [group for group in groups if wanted[group.kind] and all(map(self.selects, group.sites))]

    def _requests(self, groups: Sequence[UnitGroup]) -> list[Request]:
        """What is asked of every group; a global allocation has a budget of parameters in any case."""
        requests = [self._request(group) for group in groups]
        return balanced(requests) if self.allocation == "uniform" else requests

    def _request(self, group: UnitGroup) -> Request:
        here = self.for_site(group.name)
        multiple = here.round_to if group.kind == "channels" else 1
        return Request(group, here.fraction if here.removed is None else 0.0, multiple, here.floor)

    def _given(self, group: UnitGroup) -> list[int] | None:
        """The units that go, where the recipe names them."""
        removed = self.for_site(group.name).removed
        return None if removed is None else index_ranges.read(removed)

    def _check_given(self, group: UnitGroup) -> None:
        gone = self._given(group)
        if gone and group.fixed:
            fix = "leave `removed` out there; FFN channels can go"
            what = f"none of the {group.units} heads can be removed: the model counts them outside of its blocks"
            where = f"`removed` for {group.name}"
            raise CompressError("width.fixed-heads", what, where=where, fix=fix, exit_code=ExitCode.USAGE)
        if gone and (gone[-1] >= group.units or len(gone) == group.units):
            raise CompressError(
                "width.no-such-unit",
                f"invalid units: there are {group.units} {group.kind}, 0 to {group.units - 1}; one must stay",
                where=f"`removed` for {group.name}",
                fix="give other indices; `llmcompress inspect MODEL` shows how many there are",
                exit_code=ExitCode.USAGE,
            )

    @property
    def _chooses(self) -> bool:
        """Whether anything is left to be found out."""
        fractions = [self.fraction, *(options.get("fraction", 0.0) for options in self.overrides.values())]
        return any(fractions)

    def _cut_off(self, block: BlockWork, kept: Mapping[UnitGroup, Tensor]) -> dict[str, Refitted]:
        """Write zeros and new weights into the readers of these groups, all measured in one forward."""
        readers = [(site, group) for site in block.sites for group in kept if site.name in group.readers]
        measured = {site.name: site for site, _ in readers if self.for_site(site.name).refit != "none"}
        kinds = {kind: None for name in measured for kind in REFITS[self.for_site(name).refit].needs}
        if measured:
            block.measure(list(measured.values()), tuple(kinds))
        done: dict[str, Refitted] = {}
        for site, group in readers:
            block.context.progress.substep(f"{PASSES.name_of(type(self))} {site.info.name}")
            here = self.for_site(site.name)
            weight_OI = site.weight_OI
            owner_I = group.unit_of_column(weight_OI.device)
            kept_U = torch.zeros(group.units + 1, dtype=torch.bool, device=weight_OI.device)
            kept_U[kept[group].to(weight_OI.device)] = True
            kept_U[-1] = True  # where the owner is -1: columns of no unit stay
            new = REFITS[here.refit](site, kept_U[owner_I], owner_I, group.units, here.damping)
            site.write(new.weight_OI)
            if new.bias_O is not None:
                old_O = site.bias_O
                site.write_bias(new.bias_O if old_O is None else old_O + new.bias_O)
            done[site.name] = new
        block.forget()
        return done


@PASSES.register("width")
class Width(WidthPass):
    """Remove the units with the lowest score.

    Source: Ma et al., arXiv 2305.11627 (groups, Taylor scores); the other scores and refits name their own. Differs:
    units are found by experiment, the fraction is the same in every layer by default, and the linears that read the
    units are refitted.
    """

    whole_block: ClassVar[frozenset[str]] = WidthPass.whole_block | {"score"}

    score: str | None = Field(
        None,
        description="random, l1, l2, taylor_vector, taylor_first, taylor_second, taylor_mix, fisher, group_fisher, "
        "activation, fluctuation, lasso, uniqueness; default: activation, with a global allocation taylor_first, "
        "which counts alike in all layers",
    )

    @field_validator("score")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return None if name is None else SCORES.name_of(SCORES[name])

    @property
    def scored_by(self) -> type[Score]:
        """The score that was asked for, or the default of the allocation."""
        return SCORES[self.score or ("activation" if self.allocation == "uniform" else "taylor_first")]

    @override
    def uses_data(self) -> bool:
        return super().uses_data() or (self._chooses and self.scored_by.needs_data)

    @override
    def backward(self) -> Backward | None:
        return self.scored_by.backward if self._chooses else None

    @override
    def forwards(self) -> int:
        scored = 2 * (self._chooses and self.scored_by.needs_data and not self.scored_by.backward)
        return super().forwards() + scored

    @override
    def choose(self, whole: WholeModel, groups: Sequence[UnitGroup], requests: Sequence[Request]) -> list[Tensor]:
        allocate: Allocate = partial(ALLOCATIONS[self.allocation], requests)
        return self.scored_by(groups).choose(whole, allocate)
