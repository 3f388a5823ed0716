"""Passes that wrap a quantizer, because they need the weights from before quantization. O = outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.nested_quantizer import checked, quantizer_with
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.records.rows import SiteReport


class QuantizerWrapper(QuantizingPass):
    """Quantize each site with another pass, then improve the result. `scheme` is set here, not in the quantizer.

    Such passes can be nested, and used wherever a quantizer can.
    """

    quantizer: dict[str, dict[str, Any]] = Field(
        {"gptq": {}},
        description="one quantization pass with its options, without its scheme, e.g. {gptq: {damping: 0.02}}",
    )

    @field_validator("quantizer")
    @classmethod
    def _known_quantizer(cls, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return checked(named, sitewise=True)

    @property
    def inner(self) -> QuantizingPass:
        """The quantization pass."""
        return self._inner(self.quantizer)

    def _inner(self, named: dict[str, dict[str, Any]]) -> QuantizingPass:
        ((name, options),) = named.items()
        return quantizer_with({name: {**options, "on_indivisible": self.on_indivisible}}, self.scheme, sitewise=True)

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix for errors, and what the quantizers read."""
        others = [self._inner(options["quantizer"]) for options in self.overrides.values() if "quantizer" in options]
        read = [kind for each in (self.inner, *others) for kind in each.needs()]
        return tuple(dict.fromkeys((Gram, *read, *self.activation_statistics())))

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Quantize and improve site by site; what the quantizer leaves dense stays so."""
        rows = []
        for site in sites:
            here, weight_OI = self.for_site(site.name), site.weight_OI
            for row in here.inner.apply(block, [site]):
                rows.append(here.improve(site, weight_OI, row) if site.statistic(Gram).tokens else row)
        return rows

    @abstractmethod
    def improve(self, site: LinearSite, weight_OI: Tensor, row: SiteReport) -> SiteReport:
        """Change what the quantizer made of that weight, and its row."""
