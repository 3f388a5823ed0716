"""How many weights each site loses when one budget serves all: by outliers, or by what the loss feels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.grid import row_errors
from llmcompress.numerics.shares import counts_by_error, counts_by_outliers
from llmcompress.numerics.statistics import Gram, SquaredNorm, Statistic
from llmcompress.passes.decomposition.ranks import squared_gradients

if TYPE_CHECKING:
    from llmcompress.passes.pruning.sparse import SparsePass

OUTLIER_TIMES = 5.0
"""Source: Yin et al., arXiv 2310.05175, as is `WITHIN`."""

WITHIN = 0.08

POINTS = 9
"""Sparsities at which a site's error is measured."""


def decide_counts(each: SparsePass, whole: WholeModel) -> dict[str, Tensor]:
    """Site → how many of its weights become zero; sites with a sparsity of their own are left out."""
    if not any(_shares_budget(each, site) for site in whole.sites()):
        return {}
    return (_by_outliers if each.allocation == "outliers" else _by_loss)(each, whole)


def _by_outliers(each: SparsePass, whole: WholeModel) -> dict[str, Tensor]:
    """All sites of a block get the block's share."""
    times = OUTLIER_TIMES if each.outlier_times is None else each.outlier_times
    names: list[str] = []
    weights: list[int] = []
    outliers: list[float] = []
    for _, sites in _measured(each, whole, SquaredNorm):
        scores = [site.weight_OI.abs() * site.statistic(SquaredNorm).sum_I.sqrt() for site in sites]
        total = sum(score.numel() for score in scores)
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / total
        found = sum(int((score > times * mean).sum()) for score in scores) / total
        names += [site.name for site in sites]
        weights += [score.numel() for score in scores]
        outliers += [found] * len(sites)
    within = WITHIN if each.within is None else each.within
    counts = counts_by_outliers(torch.tensor(outliers), torch.tensor(weights), each.target, within)
    return dict(zip(names, counts, strict=True))


def _by_loss(each: SparsePass, whole: WholeModel) -> dict[str, Tensor]:
    """The expected growth of the loss: squared errors of a site's outputs times squared gradients of the loss by them.

    Errors are those of the masks that the pass itself would choose, before any repair. Without the gradients the
    same sum of errors is worse than equal shares (docs/log.md).
    """
    within = min(WITHIN if each.within is None else each.within, each.target, 1 - each.target)
    shares_S = torch.linspace(each.target - within, each.target + within, POINTS, dtype=torch.float64)
    names = [site.name for site in whole.sites() if _shares_budget(each, site)]
    gradients = squared_gradients(whole, names)
    weights: list[int] = []
    growth: list[list[float]] = []
    for block, sites in _measured(each, whole, Gram):
        for site in sites:
            block.context.progress.inside(f"errors of {site.info.name}")
            weight_OI, gram = site.weight_OI, site.statistic(Gram)
            masks = (each.mask(weight_OI, gram.sum_II.diagonal(), share) for share in shares_S.tolist())
            errors = (row_errors(weight_OI.masked_fill(~mask_OI, 0.0), gram.sum_II) for mask_OI in masks)
            felt_O = gradients[site.name].double() / max(gram.tokens, 1)
            growth.append([float(error_O.double() @ felt_O) for error_O in errors])
            weights.append(weight_OI.numel())
    counts = counts_by_error(torch.tensor(growth), shares_S, torch.tensor(weights), each.target)
    return dict(zip(names, counts, strict=True))


def _shares_budget(each: SparsePass, site: LinearSite) -> bool:
    return each.selects(site.name) and not each.has_own_share(site.name)


def _measured(
    each: SparsePass, whole: WholeModel, kind: type[Statistic]
) -> Iterator[tuple[BlockWork, list[LinearSite]]]:
    """The dense model block by block, with the sites that share the budget."""
    for block in whole.stream():
        sites = [site for site in block.sites if _shares_budget(each, site)]
        if sites:
            block.measure(sites, (kind,))
            yield block, sites
            block.forget()
