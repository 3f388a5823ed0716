"""Low-rank branches added to a quantized site, shared by several passes. O = outputs, I = inputs, R = rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.formats import packed, plain
from llmcompress.formats.named import Kind
from llmcompress.model.map import SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.low_rank import linear_of
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.numerics.low_rank import Factors, output_spectrum, truncate
from llmcompress.numerics.rounded_factors import Codes, RoundedFactors, round_factors
from llmcompress.numerics.statistics import Gram
from llmcompress.records.rows import SiteReport


@dataclass(frozen=True)
class Branch:
    """Two factors in the checkpoint's dtype, or quantized to `scheme`."""

    factors: Factors | RoundedFactors
    scheme: Scheme | None

    def product(self) -> Tensor:
        """The matrix that the branch adds, O×I."""
        return self.factors.product()

    def put(self, site: LinearSite, base: QuantLinear) -> None:
        """Replace the site by the codes and this branch."""
        if isinstance(self.factors, Factors):
            right, left = linear_of(self.factors.right_RI, None), linear_of(self.factors.left_OR, None)
            site.replace(CorrectedLinear(base, right, left))
        else:
            assert self.scheme is not None
            quantized = (_quantized(codes, self.scheme) for codes in (self.factors.right, self.factors.left))
            site.replace(CorrectedLinear(base, *quantized))


def branch(
    missing_OI: Tensor, metric: Tensor | None, rank: int, *, scheme: str | None, storage_dtype: torch.dtype, gram: Gram
) -> Branch:
    """The branch of that rank that comes nearest to what is missing; rounded as it will be stored."""
    rank = min(rank, *missing_OI.shape)
    factors = truncate(missing_OI, output_spectrum(missing_OI, metric), rank)
    if scheme is None:
        stored = (each.to(storage_dtype).to(each.dtype) for each in (factors.left_OR, factors.right_RI))
        return Branch(Factors(*stored), None)
    known = named_scheme(scheme)
    rounded = round_factors(factors, missing_OI, gram.sum_II, known.weights, scale_dtype=storage_dtype)
    return Branch(rounded, known)


def corrected_row(
    site: LinearSite, algorithm: str, base: SiteReport, rank: int, scheme: str | None, *, error: float, tokens: int
) -> SiteReport:
    """The row of a corrected site: the bits of codes and branch together, and the error of the codes alone before.

    Bits per weight = bits of the codes + bits of the factors · R (O + I) / (O I).
    """
    outputs, inputs = site.info.outputs, site.info.inputs
    rank = min(rank, outputs, inputs)
    storage = torch.finfo(site.storage_dtype).bits
    right, left = (rank, inputs), (outputs, rank)
    known = None if scheme is None else named_scheme(scheme)
    bits = sum(
        rows * columns * (known.bits_per_weight(rows, columns, storage) if known else storage)
        for rows, columns in (right, left)
    )
    assert base.bits_per_weight is not None
    return SiteReport(
        site=site.name,
        algorithm=algorithm,
        scheme=base.scheme,
        bits_per_weight=base.bits_per_weight + bits / (outputs * inputs),
        error=error,
        error_before=base.error,
        tokens=tokens,
        rank=rank,
        degraded=base.degraded,
    )


def corrected_tensors(
    before: Mapping[str, Kind], info: SiteInfo, rank: int, scheme: str | None, dtype: torch.dtype
) -> dict[str, Kind]:
    """What the files hold of a corrected site, by name within it; `before`: of its codes."""
    rank = min(rank, info.outputs, info.inputs)
    known = None if scheme is None else named_scheme(scheme)
    found: dict[str, Kind] = {"weight": (torch.float32, (0,))} | {f"base.{name}": kind for name, kind in before.items()}
    for part, shape in (("right", (rank, info.inputs)), ("left", (info.outputs, rank))):
        of_part = packed.tensors(shape, known, dtype, bias=False) if known else plain.tensors(shape, dtype, bias=False)
        found |= {f"{part}.{name}": kind for name, kind in of_part.items()}
    return found


def weight_only_scheme(name: str | None) -> str | None:
    """The name of a scheme for factors.

    Raises: ValueError when it would round activations too; CompressError when there is no such scheme.
    """
    if name is not None and named_scheme(name).activations:
        raise ValueError(
            f"factors are quantized weight-only: write {replace(named_scheme(name), activations=None).name!r}"
        )
    return name


def _quantized(codes: Codes, scheme: Scheme) -> QuantLinear:
    return QuantLinear.from_fitted(scheme, codes.codes, codes.fitted, None)
