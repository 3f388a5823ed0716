"""CMPQ: every input channel has its own bit width and codebook; a research method. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.numerics.allocation import Option, allocate
from llmcompress.numerics.codebook import (
    column_bits,
    column_levels,
    nearest_level,
    outliers,
    squared_errors,
    without,
)
from llmcompress.numerics.low_rank import relative_output_error
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.records.rows import SiteReport

_PLACE_BITS, _WIDTH_BITS = 32, 8
"""What says where a weight in full stands, and how wide a column's codes are."""


@PASSES.register("cmpq")
class ChannelwiseMixedPrecision(BlockPass):
    """Quantize each input channel with its own bit width, chosen by its activations, and k-means levels.

    `bits` counts everything that a file stores of a site: codes, codebooks, bit widths, and the full-precision outliers
    with their positions. No stock format can represent such a matrix: the result loads only after `import llmcompress`.

    Source: Chen et al., arXiv 2410.13056. Differs: bit widths come from an exact budget allocation, with squared inputs
    times squared errors as the loss, not from thresholds on activations; everything is counted.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would replace zeros by levels of its codebooks",
        "pattern": "would replace zeros by levels of its codebooks",
    }

    bits: float = Field(
        3.5, gt=1, le=16, description="average bits per weight on disk, codebooks and outliers included"
    )
    widths: tuple[int, ...] = Field((1, 2, 3, 4, 5, 6), description="candidate bit widths per channel, each 1 to 8")
    outliers: float = Field(
        0.0025, ge=0, le=0.1, description="fraction of weights kept in full precision, for each of the two outlier sets"
    )

    @field_validator("widths", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.widths or not all(1 <= width <= 8 for width in self.widths):
            raise ValueError("name at least one bit width; each must be from 1 to 8")
        return self

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """As if what stays were of 16 bits."""
        return min(1.0, self.for_site(site).bits / 16)

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix: squared inputs from its diagonal, errors from all of it."""
        return (Gram,)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Find bit widths, codebooks and codes of every site separately."""
        rows = []
        for site in sites:
            block.context.progress.substep(f"cmpq {site.info.name}")
            rows.append(self.for_site(site.name)._compress(site))
        return rows

    def _compress(self, site: LinearSite) -> SiteReport:
        weight_OI, gram = site.weight_OI, site.statistic(Gram)
        squares_I = gram.sum_II.diagonal() if gram.tokens else None
        place_N = outliers(weight_OI, squares_I, self.outliers)
        usual_IO = without(weight_OI, place_N).T.contiguous()
        width_I = self._widths_of(usual_IO, squares_I, len(place_N), site)
        if width_I is None:
            why = f"kept dense: its codebooks do not fit into {self.bits:g} bits per weight"
            return SiteReport(site=site.name, algorithm="cmpq", tokens=gram.tokens, degraded=why)
        codes_IO = torch.zeros(usual_IO.shape, dtype=torch.int16, device=usual_IO.device)
        levels: dict[int, Tensor] = {}
        for width in sorted(set(width_I.tolist())):
            columns_CO = usual_IO[width_I == width]
            # rounded before codes are chosen: these are the levels that will be stored
            levels[width] = column_levels(columns_CO, 1 << width).to(site.storage_dtype).float()
            codes_IO[width_I == width] = nearest_level(columns_CO, levels[width])
        value_N = weight_OI.flatten()[place_N].to(site.storage_dtype).float()
        module = CodebookLinear.from_codes(codes_IO, width_I, levels, place_N, value_N, site.bias_O)
        site.replace(module)
        return SiteReport(
            site=site.name,
            algorithm="cmpq",
            bits_per_weight=self._stored_bits(width_I, len(place_N), site) / weight_OI.numel(),
            error=relative_output_error(weight_OI, site.weight_OI, gram.sum_II) if gram.tokens else None,
            tokens=gram.tokens,
            degraded=None if gram.tokens else "no tokens reached it: all inputs are weighted equally",
        )

    def _stored_bits(self, width_I: Tensor, full: int, site: LinearSite) -> int:
        outputs, stored = site.info.outputs, torch.finfo(site.storage_dtype).bits
        columns = sum(column_bits(outputs, width, stored) for width in width_I.tolist())
        return columns + self._overhead(site.info.inputs, full, stored)

    def _widths_of(self, usual_IO: Tensor, squares_I: Tensor | None, full: int, site: LinearSite) -> Tensor | None:
        """The width of every column, or None where not even the smallest fit."""
        inputs, outputs = usual_IO.shape
        stored = torch.finfo(site.storage_dtype).bits
        widths = sorted(set(self.widths))
        errors_IW = squared_errors(usual_IO, widths)
        if squares_I is not None:
            errors_IW = errors_IW * squares_I.double()[:, None]
        sizes = [column_bits(outputs, width, stored) for width in widths]
        budget = int(self.bits * usual_IO.numel()) - self._overhead(inputs, full, stored)
        if budget < inputs * sizes[0]:
            return None
        options = [list(map(Option, sizes, errors)) for errors in errors_IW.tolist()]
        chosen = allocate(options, budget)
        return torch.tensor([widths[index] for index in chosen], device=usual_IO.device)

    def _overhead(self, inputs: int, full: int, stored: int) -> int:
        """Stored bits besides codes and codebooks."""
        return inputs * _WIDTH_BITS + full * (stored + _PLACE_BITS)
