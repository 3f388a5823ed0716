"""What all quantization passes share: the scheme, exceptions, the quantized module, the report row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.rounded_inputs import fixed_scale
from llmcompress.modules.scheme import DESCRIPTION, Scheme, named_scheme
from llmcompress.numerics.grid import Fitted, output_error, restore, row_pieces
from llmcompress.numerics.statistics import AbsMax, Gram, Statistic
from llmcompress.passes.base import BlockPass, Trait
from llmcompress.passes.baselines import with_options_of
from llmcompress.passes.schemes import OnIndivisible, fitting_notes, resolve_scheme, site_schemes
from llmcompress.records.rows import SiteReport


class QuantizingPass(BlockPass):
    """A pass that replaces its sites by quantized ones."""

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes"})

    sitewise: ClassVar[bool] = True
    """Whether it leaves codes and nothing else changed, site by site: such a pass can serve inside another one."""

    scheme: str = Field("int4_g128", description=DESCRIPTION)
    on_indivisible: OnIndivisible = Field(
        "error",
        description="if inputs do not divide into groups. error: refuse; fit: the longest power of two that divides, "
        "at least 32, otherwise one scale per row; skip: leave dense; channel: one scale per row; pad: shorter last "
        "group",
    )

    @field_validator("scheme")
    @classmethod
    def _known(cls, name: str) -> str:
        return named_scheme(name).name

    def check(self, model_map: ModelMap) -> None:
        """Raises: CompressError listing every site whose inputs do not divide into groups."""
        site_schemes([self], model_map)

    def notes(self, model_map: ModelMap) -> list[str]:
        """Which sites get another scheme than the one asked for, because groups must divide."""
        return fitting_notes([self], model_map)

    @override
    def conflict_with(self, trait: Trait) -> str | None:
        """A mask needs a grid with a zero."""
        if trait in ("zeros", "pattern") and named_scheme(self.scheme).weights.scales.minima:
            return f"would lose the mask: {self.scheme} has minima and no exact zero (q3_k and q6_k have one)"
        return super().conflict_with(trait)

    def schemes(self) -> tuple[str, ...]:
        """Every scheme this pass may use, overrides included."""
        return (self.scheme, *(str(options["scheme"]) for options in self.overrides.values() if "scheme" in options))

    def scheme_for(self, site: str, inputs: int) -> Scheme | None:
        """What the site becomes; None when it stays dense.

        Raises: CompressError when its inputs do not divide into groups and the recipe does not say what then.
        """
        return resolve_scheme(self.for_site(site), site, inputs)

    def plain(self) -> Sequence[BlockPass] | None:
        """Rounding to nearest on the same grids; None where inputs must be measured, or more than codes is left."""
        if self.leaves != {"codes"} or self.activation_statistics():
            return None
        return (with_options_of(self, "rtn", ("scheme", "on_indivisible")),)

    def activation_statistics(self) -> tuple[type[Statistic], ...]:
        """Static activation scales need the largest input."""
        return (AbsMax,) if any(named_scheme(name).measures_inputs for name in self.schemes()) else ()


_MANY_ZEROS = 1e-3


def note_zeros(block: BlockWork, sites: Sequence[LinearSite]) -> None:
    """Tell, at the first block, what becomes of exact zeros that the checkpoint brought along."""
    if block.info.index or block.context.zeros_are_masks:
        return
    weights = sum(site.weight_OI.numel() for site in sites)
    zeros = sum(int((site.weight_OI == 0).sum()) for site in sites)
    pruned = sum(int(site.pruned_OI.sum()) for site in sites)
    if zeros > _MANY_ZEROS * weights:
        what = "pruned, so they stay zero" if pruned else "a level of the grid of a quantized checkpoint, not a mask"
        share = f"{zeros / weights:.1%} of the weights of {block.info.name}"
        block.context.progress.note(f"{share} are exactly zero: {what}")


def put_codes(site: LinearSite, scheme: Scheme, codes_OI: Tensor, fitted: Fitted) -> None:
    """Replace the site by its quantized self; static activations get the scale their largest input asks for.

    Raises: CompressError when weights are pruned and the scheme has no zero.
    """
    if scheme.weights.scales.minima and bool(site.pruned_OI.any()):
        raise CompressError(
            "scheme.no-zero",
            f"{scheme.name} has minima and no exact zero, and weights of this model are pruned",
            where=site.name,
            fix="use q3_k, q6_k or an integer scheme",
            exit_code=ExitCode.USAGE,
        )
    input_scale = None
    if scheme.measures_inputs:
        input_scale = fixed_scale(site.statistic(AbsMax).max_I.max(), scheme)
    if input_scale is not None and scheme.activations == "tensor":
        rounded = input_scale.to(site.storage_dtype).float()
        input_scale = torch.where(rounded > 0, rounded, torch.ones_like(rounded))
    site.replace(QuantLinear.from_fitted(scheme, codes_OI, fitted, site.bias_O, input_scale))


def dense_of(base: QuantLinear) -> Tensor:
    """The weight that the codes stand for, in float32."""
    return base.dense_weight().float()


def report_row(
    site: LinearSite,
    scheme: Scheme,
    algorithm: str,
    *,
    error: float | None = None,
    error_before: float | None = None,
    tokens: int | None = None,
    degraded: str | None = None,
) -> SiteReport:
    """The row of a quantized site."""
    bits = scheme.bits_per_weight(site.info.outputs, site.info.inputs, torch.finfo(site.storage_dtype).bits)
    return SiteReport(
        site=site.name,
        algorithm=algorithm,
        scheme=scheme.name,
        bits_per_weight=bits,
        error=error,
        error_before=error_before,
        tokens=tokens,
        degraded=degraded,
    )


def relative_error(weight_OI: Tensor, codes_OI: Tensor, fitted: Fitted, gram: Gram) -> float:
    """Squared output error of the codes ÷ squared output, on what `gram` saw; 0 when that was nothing."""
    signal = output_energy(weight_OI, gram)
    return output_noise(weight_OI, codes_OI, fitted, gram) / signal if signal > 0 else 0.0


def output_energy(weight_OI: Tensor, gram: Gram) -> float:
    """Squared output on what `gram` saw."""
    return sum(float(output_error(weight_OI[rows], gram.sum_II)) for rows in row_pieces(weight_OI))


def output_noise(weight_OI: Tensor, codes_OI: Tensor, fitted: Fitted, gram: Gram) -> float:
    """Squared output error of the codes on what `gram` saw."""
    return sum(
        float(output_error(restore(codes_OI[rows], fitted.rows(rows)).sub_(weight_OI[rows]), gram.sum_II))
        for rows in row_pieces(weight_OI)
    )
