"""Sparsity allocation: how many weights each site loses under one budget, by outliers or by sensitivity of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.grid import row_errors
from llmcompress.numerics.sparsity_allocation import counts_by_error, counts_by_outliers
from llmcompress.numerics.statistics import Gram, SquaredNorm
from llmcompress.sensitivity.gradients import GradientObserver, OutputSquares
from llmcompress.sensitivity.loss_estimators import Kinds, LossEstimator, cached_table, dense_stream, measure_losses
from llmcompress.sensitivity.table import LossTable, Row

OUTLIER_TIMES = 5.0
"""Source: Yin et al., arXiv 2310.05175, as is `WITHIN`."""

WITHIN = 0.08

POINTS = 9
"""Sparsities at which a site's error is measured."""


class CountOptions(Protocol):
    """The options that sparsity allocation needs from a pass."""

    @property
    def allocation(self) -> str:
        """`outliers` or `loss`."""

    @property
    def target(self) -> float:
        """The sparsity over all sites."""

    @property
    def outlier_times(self) -> float | None:
        """How many times the mean an outlier is."""

    @property
    def within(self) -> float | None:
        """How far shares may lie from the target."""

    def selects(self, site: str) -> bool:
        """Whether it works on that site."""

    def has_own_share(self, site: str) -> bool:
        """Whether the site's sparsity is fixed."""

    def mask(self, weight_OI: Tensor, squares_I: Tensor, share: float) -> Tensor:
        """True where a weight is dropped."""


def decide_shares(options: CountOptions, whole: WholeModel) -> dict[str, Tensor]:
    """Site → its sparsity, for a whole number of weights; without sites that set their own."""
    names = [site.name for site in whole.sites() if options.selects(site.name)]
    names = [name for name in names if not options.has_own_share(name)]
    if not names:
        return {}
    decide = _by_outliers if options.allocation == "outliers" else _by_loss
    return shares_of(whole, decide(options, whole, frozenset(names)))


def shares_of(whole: WholeModel, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Numbers of weights of sites → shares, float64."""
    weights = {site.name: site.info.outputs * site.info.inputs for site in whole.sites()}
    return {name: torch.tensor(count / weights[name], dtype=torch.float64) for name, count in counts.items()}


def _by_outliers(options: CountOptions, whole: WholeModel, names: frozenset[str]) -> dict[str, int]:
    """All sites of a block get the block's share."""
    times = OUTLIER_TIMES if options.outlier_times is None else options.outlier_times
    chosen: list[str] = []
    weights: list[int] = []
    outliers: list[float] = []
    for block in dense_stream(whole, [(names, (SquaredNorm,))]):
        sites = [site for site in block.sites if site.name in names]
        if not sites:
            continue
        scores = [site.weight_OI.abs() * site.statistic(SquaredNorm).sum_I.sqrt() for site in sites]
        total = sum(score.numel() for score in scores)
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / total
        found = sum(int((score > times * mean).sum()) for score in scores) / total
        chosen += [site.name for site in sites]
        weights += [score.numel() for score in scores]
        outliers += [found] * len(sites)
    within = WITHIN if options.within is None else options.within
    counts = counts_by_outliers(torch.tensor(outliers), torch.tensor(weights), options.target, within)
    return dict(zip(chosen, counts.tolist(), strict=True))


@dataclass
class SparsityEstimator(LossEstimator):
    """The expected increase of the loss: squared errors of a site's outputs times squared gradients of the loss.

    Errors are those of the masks that the pass itself would choose, before any weight update. Without the gradients the
    same sum of errors is worse than uniform sparsity (docs/log.md).
    """

    options: CountOptions
    names: frozenset[str]
    shares: Sequence[float]

    def __post_init__(self) -> None:
        self.gradients = OutputSquares(sorted(self.names))

    @property
    @override
    def sites(self) -> frozenset[str]:
        return self.names

    @property
    @override
    def kinds(self) -> Kinds:
        return (Gram,)

    @property
    @override
    def observers(self) -> Sequence[GradientObserver]:
        return (self.gradients,)

    @override
    def rows(self, block: BlockWork, sites: Sequence[LinearSite]) -> Iterator[Row]:
        for site in sites:
            block.context.progress.substep(f"errors of {site.info.name}")
            weight_OI, gram = site.weight_OI, site.statistic(Gram)
            masks = (self.options.mask(weight_OI, gram.sum_II.diagonal(), share) for share in self.shares)
            errors = (row_errors(weight_OI.masked_fill(~mask_OI, 0.0), gram.sum_II) for mask_OI in masks)
            felt_O = self.gradients.sums[site.name].double() / max(gram.tokens, 1)
            losses = [float(error_O.double() @ felt_O) for error_O in errors]
            stored, weights = torch.finfo(site.storage_dtype).bits, weight_OI.numel()
            bits = [round((1 - share) * weights) * stored for share in self.shares]
            shape = tuple(weight_OI.shape)
            yield Row.of(site.name, [str(share) for share in self.shares], losses, bits, [shape] * len(bits))


def _by_loss(options: CountOptions, whole: WholeModel, names: frozenset[str]) -> dict[str, int]:
    within = min(WITHIN if options.within is None else options.within, options.target, 1 - options.target)
    sparsities_S = torch.linspace(options.target - within, options.target + within, POINTS, dtype=torch.float64)

    def measured() -> LossTable:
        (table,) = measure_losses(whole, [SparsityEstimator(options, names, sparsities_S.tolist())])
        return table

    table = cached_table(whole, "sparsity-losses", measured)
    losses_PS = torch.stack([row.loss_C for row in table.rows])
    weights_P = torch.stack([row.shape_CD[0].prod() for row in table.rows])
    counts = counts_by_error(losses_PS, sparsities_S, weights_P, options.target)
    return dict(zip(table.units, counts.tolist(), strict=True))
