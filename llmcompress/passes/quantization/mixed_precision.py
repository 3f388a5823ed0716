"""Mixed precision: a scheme for every site under one budget of bits, then any quantizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.model.site import LinearSite
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.scheme import DESCRIPTION, Scheme, named_scheme
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, Backward, BlockPass, Trait
from llmcompress.passes.nested_quantizer import AroundQuantizer, quantizer_with
from llmcompress.passes.quantization.sensitivity import Sensitivity, rounding_losses
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.passes.schemes import OnIndivisible, fitting_notes, resolve_scheme, site_schemes
from llmcompress.records.rows import SiteReport
from llmcompress.sensitivity.allocation import bits_of, least_and_most_bits, least_loss
from llmcompress.sensitivity.loss_estimators import cached_table
from llmcompress.sensitivity.table import LossTable

CANDIDATES = (
    *("int2_g64", "int3_channel", "int3_g64", "int3_g32", "int4_channel", "int4_g64"),
    *("int5_channel", "int6_channel", "int8_channel"),
)
"""Groups and whole rows: where rows will do, the bits of their many scales serve better elsewhere (docs/log.md)."""

WITHIN = 0.01
"""Bits per weight by which the average may stay below `bits`, where the sites' sizes allow it."""

_BACKWARD: Mapping[Sensitivity, Backward | None] = {
    "gradients": Backward(recomputes=True),
    "rate": Backward(recomputes=True),
    "fisher": Backward(copies=1, windows=1, recomputes=True),
    "hessian": Backward(copies=4, windows=1),
    "kl": None,
    "output": None,
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@PASSES.register("mixed_precision")
class MixedPrecision(BlockPass):
    """Choose a candidate scheme for each site so that the model loses least within the budget, then quantize with them.

    The decision becomes ordinary `overrides` of the quantizer: `with_decisions` returns that pass, and `llmcompress
    allocate` writes it as a recipe.

    Source: see `sensitivity.py`. The allocation is exact (`numerics/allocation.py`), not rounded from a continuous
    solution.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes"})
    decides: ClassVar[bool] = True
    whole_block: ClassVar[frozenset[str]] = frozenset({"quantizer", "bits", "budget", "sensitivity", "samples", "per"})

    quantizer: dict[str, dict[str, Any]] = Field(
        {"gptq": {}},
        description="one quantization pass with its options, without its scheme, e.g. {gptq: {damping: 0.02}}",
    )
    schemes: tuple[str, ...] = Field(
        CANDIDATES, description=f"candidate schemes, best in many small steps of size; each {DESCRIPTION}"
    )
    bits: float | None = Field(
        None,
        gt=1,
        le=32,
        description="average bits per selected weight, scales included, as `save.format: llmcompress` stores them; "
        "other formats pad 3, 5, 6 and 7 bits to 4 or 8 (3.5 if there is no budget)",
    )
    budget: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]*(\.[0-9]+)? ?[KMGT]B$",
        description="instead of `bits`: bytes of all weights, dense ones included, e.g. 1.2GB; what passes "
        "before this one rounded, such as `embeddings`, counts with its fewer bits",
    )
    sensitivity: Sensitivity = Field(
        "gradients",
        description="loss model. gradients: output error × squared gradients; rate: the same with "
        "the error of rate–distortion theory; fisher, hessian: of the weights; kl: one forward pass each; "
        "output: relative output error",
    )
    per: Literal["group", "site"] = Field(
        "group",
        description="group: linears that share an input (q, k, v; gate, up) get the same scheme, as runtimes that fuse "
        "them require; site: every linear has its own",
    )
    samples: int = Field(32, ge=1, description="calibration windows used for the allocation")

    @field_validator("schemes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("schemes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("name at least one candidate scheme")
        return tuple(dict.fromkeys(named_scheme(name).name for name in names))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.bits is not None and self.budget is not None:
            raise ValueError("give `bits` or `budget`, not both (set the other to null)")
        if not self.with_decisions({}).quantizes():
            raise ValueError("the quantizer must round: remove `round: false`")
        return self

    @override
    def with_decisions(self, decisions: Mapping[str, Tensor]) -> QuantizingPass:
        """The quantizer with what was decided as ordinary overrides; it works on the same sites and does the same."""
        names = {site: self.for_site(site).schemes[int(index)] for site, index in decisions.items()}
        common = Counter(names.values()).most_common(1)[0][0] if names else self.scheme
        overrides = {site: {"scheme": name} for site, name in names.items() if name != common}
        # the quantizer alone would join the stage of the pass before, and work on what its first blocks left
        return self._quantizer(common, overrides).model_copy(update={"new_stage": True})

    @property
    def scheme(self) -> str:
        """The candidate whose bits come nearest to the average asked for: what is known before the decision."""
        wanted = (3.5 if self.bits is None else self.bits) - 0.25
        return min(self.schemes, key=lambda name: abs(named_scheme(name).weights.bits - wanted))

    @property
    def on_indivisible(self) -> OnIndivisible:
        """What the quantizer does with sites that do not divide into a candidate's groups."""
        return self._quantizer(self.schemes[0], {}).on_indivisible

    def check(self, model_map: ModelMap) -> None:
        """Every candidate must fit every site that is selected, unless `on_indivisible` says what then.

        Raises: CompressError listing every site whose inputs do not divide into groups.
        """
        for scheme in self.schemes:
            site_schemes([self._quantizer(scheme, {})], model_map)

    def notes(self, model_map: ModelMap) -> list[str]:
        """Which sites get another group than a candidate asks for."""
        return fitting_notes([self._quantizer(scheme, {}) for scheme in self.schemes], model_map)

    def needs(self) -> tuple[type[Statistic], ...]:
        """What the quantizer reads, whichever candidates are chosen."""
        each = (self._quantizer(scheme, {}).needs() for scheme in self.schemes)
        return tuple(dict.fromkeys(kind for kinds in each for kind in kinds))

    def uses_data(self) -> bool:
        """The decision does."""
        return True

    def wants_dense(self) -> bool:
        """As the quantizer."""
        return self.with_decisions({}).wants_dense()

    def streams(self) -> bool:
        """Only errors of outputs are found block by block."""
        return self.sensitivity == "output" and self.with_decisions({}).streams()

    def forwards(self) -> int:
        """Errors of the candidates take a stream of their own."""
        return super().forwards() + 2

    def backward(self) -> Backward | None:
        """Gradients of outputs are added up as they come; of weights there are copies."""
        return _BACKWARD[self.sensitivity]

    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """The index of every site's scheme among its candidates.

        Raises: CompressError when the budget is below what the smallest candidates need, or `bits` above the largest.
        """
        candidates = {
            site.name: [self._resolved(name, site) for name in self.for_site(site.name).schemes]
            for site in whole.sites()
            if self.selects(site.name)
        }
        if not candidates:
            return {}
        few = whole.within(whole.context.first_windows(self.samples))
        table = cached_table(
            few,
            "scheme-losses",
            lambda: rounding_losses(self.sensitivity, few, candidates, self._quantizers(candidates)),
        )
        groups = self._groups(whole.map, table)
        shared = table.together(groups).rising()
        weights = sum(site.info.outputs * site.info.inputs for site in whole.sites() if site.name in candidates)
        goal, floor = self._goal(whole, shared, weights)
        chosen = least_loss(shared, goal, at_least=floor)
        whole.context.progress.note(f"{bits_of(shared, chosen) / weights:.3f} bits per weight on average")
        of_site = {name: torch.tensor(chosen[group[0]]) for group in groups for name in group}
        return {name: of_site[name] for name in candidates}

    def _groups(self, model_map: ModelMap, table: LossTable) -> list[tuple[str, ...]]:
        """Sites that get one scheme: those that read the same input and have the same candidates."""
        if self.per == "site":
            return [(unit,) for unit in table.units]
        options = {row.unit: row.options for row in table.rows}
        found: dict[object, list[str]] = {}
        for block in model_map.blocks:
            for number, group in enumerate(block.structure.groups):
                for name in map(block.full, group.sites):
                    if name in options:
                        found.setdefault((block.index, number, options[name]), []).append(name)
        return [tuple(names) for names in found.values()]

    def run(self, block: BlockWork) -> list[SiteReport]:
        """What the quantizer does, with the schemes that were decided."""
        return self.with_decisions(self._here(block)).run(block)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """The same on sites that are measured already."""
        return self.with_decisions(self._here(block)).apply(block, sites)

    def _here(self, block: BlockWork) -> dict[str, Tensor]:
        names = {site.name for site in block.sites}
        return {name: index for name, index in block.decisions.items() if name in names}

    def _quantizer(self, scheme: str, overrides: dict[str, dict[str, Any]]) -> QuantizingPass:
        return quantizer_with(self.quantizer, scheme, sites=self.sites, exclude=self.exclude, overrides=overrides)

    def _quantizers(self, candidates: Mapping[str, Sequence[Scheme | None]]) -> dict[Scheme, QuantizingPass]:
        """What tells the candidates' errors: the quantizer, or the one that finds the codes it starts from; none where
        that does more than quantize site by site."""
        schemes = dict.fromkeys(scheme for each in candidates.values() for scheme in each if scheme is not None)
        found = {scheme: self._quantizer(scheme.name, {}) for scheme in schemes}
        found = {scheme: _innermost(each) for scheme, each in found.items()}
        return found if all(each.sitewise for each in found.values()) else {}

    def _resolved(self, scheme: str, site: LinearSite) -> Scheme | None:
        return resolve_scheme(self._quantizer(scheme, {}), site.name, site.info.inputs)

    def _goal(self, whole: WholeModel, table: LossTable, weights: int) -> tuple[int, int]:
        """The most bits that the sites may take together, and the least that they should."""
        least, most = least_and_most_bits(table)
        if self.budget is None:
            bits = 3.5 if self.bits is None else self.bits
            goal, floor = math.floor(bits * weights), math.ceil((bits - WITHIN) * weights)
        else:
            stored = torch.finfo(whole.context.storage_dtype).bits
            everything = sum(parameter.numel() for parameter in whole.model.parameters())
            modules = (each for each in whole.model.modules() if isinstance(each, CompressedModule))
            coded = sum(each.coded_bits() for each in modules)  # by passes before, such as `embeddings`
            number, unit = float(self.budget[:-2]), self.budget[-2:]
            goal, floor = int(8 * number * _UNITS[unit]) - (everything - weights) * stored - coded, 0
        if goal < least or floor > most:
            wanted = f"budget: {self.budget}" if self.budget else f"bits: {goal / weights:g}"
            raise CompressError(
                "allocation.impossible",
                f"the candidates take {least / weights:.3f} to {most / weights:.3f} bits per weight on average",
                where=f"mixed_precision ({wanted}"
                + (f", which leaves {goal / weights:.3f} bits per weight for these sites)" if self.budget else ")"),
                fix="change `bits` or `budget`, or give other `schemes`",
                exit_code=ExitCode.USAGE,
            )
        return goal, floor


def _innermost(quantizer: QuantizingPass) -> QuantizingPass:
    while isinstance(quantizer, AroundQuantizer):
        quantizer = quantizer.inner
    return quantizer
