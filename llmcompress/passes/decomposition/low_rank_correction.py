"""A low-rank branch that compensates the quantization error of a site. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.formats.named import Kind
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import codes_of
from llmcompress.numerics.low_rank import relative_output_error
from llmcompress.numerics.statistics import AbsMean, Gram, Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.passes.decomposition.branch import branch, corrected_row, corrected_tensors, weight_only_scheme
from llmcompress.passes.quantizing import QuantizingPass, dense_of
from llmcompress.passes.schemes import OnIndivisible, fitting_notes, resolve_scheme, site_schemes
from llmcompress.records.rows import SiteReport

_SELECTORS = frozenset({"sites", "exclude", "overrides", "new_stage"})


@PASSES.register("low_rank_correction")
class LowRankCorrection(BlockPass):
    """Quantize each site with another pass, then add the low-rank branch that best restores its outputs.

    The branch is fitted to the same weights that the quantizer sees, so the quantizer is an option of this pass and not
    a separate pass before it.

    Source: Liu et al., arXiv 2410.21271 (EoRA: `gram`); Zhang et al., arXiv 2402.02446 (LQER: `activation`).
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes", "factors"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would fill zeros through its dense branch",
        "pattern": "would fill zeros through its dense branch",
    }
    whole_block: ClassVar[frozenset[str]] = frozenset({"whitening"})

    quantizer: dict[str, dict[str, Any]] = Field(
        {"gptq": {}}, description="one quantization pass with its options, e.g. {gptq: {scheme: int3_g128}}"
    )
    rank: int = Field(64, ge=1, description="rank of the low-rank branch")
    whitening: Literal["gram", "activation"] = Field("gram", description="gram: EoRA; activation: LQER")
    factor_scheme: str | None = Field(
        None, description="scheme of the factors, e.g. int8_channel; null: the model's dtype"
    )

    @field_validator("factor_scheme")
    @classmethod
    def _weights_only(cls, name: str | None) -> str | None:
        return weight_only_scheme(name)

    @field_validator("quantizer")
    @classmethod
    def _known_quantizer(cls, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        quantizer_of(named)
        return named

    @property
    def inner(self) -> QuantizingPass:
        """The quantization pass."""
        return quantizer_of(self.quantizer)

    @property
    def scheme(self) -> str:
        """The scheme of the codes."""
        return self.inner.scheme

    @property
    def on_indivisible(self) -> OnIndivisible:
        """What happens to sites that do not divide into the scheme's groups."""
        return self.inner.on_indivisible

    def notes(self, model_map: ModelMap) -> list[str]:
        """Which sites get another group than the scheme asks for."""
        return fitting_notes([self], model_map)

    def check(self, model_map: ModelMap) -> None:
        """Runs the quantizer's checks on the sites selected here.

        Raises: CompressError listing every site whose inputs do not divide into groups.
        """
        site_schemes([self], model_map)

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix for errors, the mean magnitude for LQER, and what the quantizers read."""
        inner = [quantizer_of(options["quantizer"]) for options in self.overrides.values() if "quantizer" in options]
        kinds: list[type[Statistic]] = [Gram, *(kind for each in (self.inner, *inner) for kind in each.needs())]
        if self.whitening == "activation":
            kinds.append(AbsMean)
        return tuple(dict.fromkeys(kinds))

    @override
    def site_tensors(self, site: str, info: SiteInfo, found: Mapping[str, Kind], dtype: torch.dtype) -> dict[str, Kind]:
        """Codes and branch; a site that the branch does not help, or that data never reach, has codes alone."""
        here = self.for_site(site)
        if resolve_scheme(here, site, info.inputs) is None:
            return dict(found)
        return corrected_tensors(found, info, here.rank, here.factor_scheme, dtype)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Quantize and correct site by site; what the quantizer leaves dense stays so."""
        rows = []
        for site in sites:
            here = self.for_site(site.name)
            weight_OI, gram = site.weight_OI, site.statistic(Gram)
            for row in here.inner.apply(block, [site]):
                rows.append(here._correct(site, weight_OI, row) if gram.tokens else row)
        return rows

    def _correct(self, site: LinearSite, weight_OI: Tensor, base_row: SiteReport) -> SiteReport:
        base, gram = codes_of(site.module), site.statistic(Gram)
        metric = gram.sum_II if self.whitening == "gram" else site.statistic(AbsMean).mean_I.square()
        missing_OI = weight_OI - dense_of(base)
        repair = branch(
            missing_OI, metric, self.rank, scheme=self.factor_scheme, storage_dtype=site.storage_dtype, gram=gram
        )
        before = relative_output_error(weight_OI, dense_of(base), gram.sum_II)
        error = relative_output_error(weight_OI, dense_of(base) + repair.product(), gram.sum_II)
        repair.put(site, base)
        row = base_row.model_copy(update={"error": before})
        return corrected_row(
            site, "low_rank_correction", row, self.rank, self.factor_scheme, error=error, tokens=gram.tokens
        )


def quantizer_of(named: Mapping[str, dict[str, Any]]) -> QuantizingPass:
    """The quantization pass that `{name: {option: value}}` stands for.

    Raises: ValueError when it is none, or could not work inside another pass.
    """
    if len(named) != 1:
        raise ValueError("name exactly one quantization pass, e.g. {gptq: {scheme: int3_g128}}")
    ((name, options),) = named.items()
    known = [each for each in PASSES if issubclass(PASSES[each], QuantizingPass)]
    serving = [each for each in known if getattr(PASSES[each], "sitewise", False)]
    if name not in serving:
        why = (
            "changes more than one site at a time: put it before this pass, with `round: false`"
            if name in known
            else "is none"
        )
        raise ValueError(f"use one of {', '.join(serving)}; {name!r} {why}")
    cls = PASSES[name]
    assert issubclass(cls, QuantizingPass)
    foreign = sorted((_SELECTORS | cls.whole_block) & options.keys())
    if foreign:
        raise ValueError(f"{foreign[0]!r} cannot be set in `quantizer`: it runs on one site at a time")
    return cls(**options)
