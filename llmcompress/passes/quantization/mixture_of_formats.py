"""Mixture of formats: each site gets the best number format of a given bit width. T = tokens, I = inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch.nn import functional

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import ModelMap
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import DESCRIPTION, named_scheme
from llmcompress.numerics.sample import InputSample
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.passes.nested_quantizer import quantizer_with
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.passes.schemes import OnIndivisible, fitting_notes, site_schemes
from llmcompress.records.rows import SiteReport


@PASSES.register("mixture_of_formats")
class MixtureOfFormats(BlockPass):
    """Quantize each site with every candidate and keep the one with the least error; the first one if equal.

    Source: Zhang et al., arXiv 2305.12356 (MoFQ): integers or floats of the same width, by the weight error for
    weight-only schemes and by the output error if activations are quantized too.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes"})
    whole_block: ClassVar[frozenset[str]] = frozenset({"quantizer", "error"})

    schemes: tuple[str, ...] = Field(
        ("int4_g32", "fp4_g32"), description=f"candidate schemes of equal bit width, each {DESCRIPTION}"
    )
    quantizer: dict[str, dict[str, Any]] = Field(
        {"rtn": {"range": "mse"}}, description="one quantization pass with its options, without its scheme"
    )
    error: Literal["weights", "outputs"] | None = Field(
        None, description="which squared error decides; null: outputs if activations are quantized, else weights"
    )

    @field_validator("schemes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        widths = {named_scheme(name).weights.bits for name in self.schemes}
        if len(widths) != 1:
            raise ValueError(
                f"candidates must have the same bit width, not {sorted(widths)}; for mixed widths use `mixed_precision`"
            )
        assert self._quantizers()
        return self

    @property
    def scheme(self) -> str:
        """The first candidate: all have the same width."""
        return self.schemes[0]

    @property
    def on_indivisible(self) -> OnIndivisible:
        """What the quantizer does with sites that do not divide into a candidate's groups."""
        return self._quantizers()[0].on_indivisible

    def check(self, model_map: ModelMap) -> None:
        """Raises: CompressError listing every site whose inputs do not divide into a candidate's groups."""
        for each in self._quantizers():
            site_schemes([each], model_map)

    def notes(self, model_map: ModelMap) -> list[str]:
        """Which sites get another group than the candidates ask for."""
        return fitting_notes(self._quantizers(), model_map)

    def needs(self) -> tuple[type[Statistic], ...]:
        """What the quantizers read, and some inputs where outputs are compared."""
        kinds = [kind for each in self._quantizers() for kind in each.needs()]
        return tuple(dict.fromkeys([*kinds, InputSample] if self._by_outputs() else kinds))

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Choose site by site."""
        rows = []
        for site in sites:
            block.context.progress.substep(f"mixture_of_formats {site.info.name}")
            rows += self.for_site(site.name)._choose(block, site)
        return rows

    @torch.no_grad()
    def _choose(self, block: BlockWork, site: LinearSite) -> list[SiteReport]:
        weight_OI, dense = site.weight_OI, site.module
        found = []
        for each in self._quantizers():
            site.replace(dense)
            rows = each.apply(block, [site])
            if rows:
                if self._by_outputs() and site.statistic(InputSample).tokens:
                    x_TI, module = site.statistic(InputSample).rows_KI, site.module
                    wanted = functional.linear(x_TI, weight_OI)
                    bias_O = site.bias_O
                    got = module(x_TI) if bias_O is None else module(x_TI) - bias_O
                else:
                    wanted, got = weight_OI, site.weight_OI
                signal = float(wanted.square().sum(dtype=torch.float64))
                error = float((got - wanted).square().sum(dtype=torch.float64))
                found.append((error / signal if signal > 0 else 0.0, site.module, rows[0]))
        if not found:
            return []
        error, module, row = min(found, key=lambda choice: choice[0])
        site.replace(module)
        worst = max(each for each, _, _ in found)
        told: dict[str, object] = {"algorithm": "mixture_of_formats", "score": error}
        if self._by_outputs():
            told |= {"error": error, "error_before": worst, "tokens": site.statistic(InputSample).tokens}
        return [row.model_copy(update=told)]

    def _by_outputs(self) -> bool:
        rounded = any(named_scheme(name).activations for name in self.schemes)
        return self.error == "outputs" if self.error else rounded

    def _quantizers(self) -> list[QuantizingPass]:
        return [quantizer_with(self.quantizer, scheme, sitewise=True) for scheme in self.schemes]
