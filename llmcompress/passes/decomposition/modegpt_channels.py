"""Removes FFN channels by the Nyström approximation. I = inputs of the reading linear, U = channels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.units import groups_of
from llmcompress.numerics.modular import nystrom_channels
from llmcompress.numerics.refit import Refitted, refit_columns
from llmcompress.numerics.statistics import Gram
from llmcompress.records.rows import SiteReport


def shrink_channels(block: BlockWork, keep: Mapping[int, int], *, ridge: float) -> list[SiteReport]:
    """Keep so many channels of these width groups: those the others explain worst; what reads them is refitted."""
    groups = [group for group in groups_of(block.info) if group.index in keep]
    group_of = {name: group for group in groups for name in group.readers}
    readers = [site for site in block.sites if site.name in group_of]
    block.measure(readers, (Gram,))
    chosen: dict[int, Tensor] = {}
    refitted: dict[str, tuple[Refitted, int]] = {}
    for site in readers:
        group, gram = group_of[site.name], site.statistic(Gram)
        unit_of_I = group.unit_of_column(gram.sum_II.device)
        if group.index not in chosen:
            column_U = unit_of_I.argsort(stable=True)[int((unit_of_I < 0).sum()) :]
            chosen[group.index] = nystrom_channels(gram.sum_II[column_U][:, column_U], keep[group.index], ridge=ridge)
        kept_I = (unit_of_I < 0) | chosen[group.index][unit_of_I.clamp_min(0)]
        new = refit_columns(site.weight_OI, gram.sum_II, kept_I, damping=ridge)
        site.write(new.weight_OI)
        refitted[site.name] = (new, gram.tokens)
    block.forget()
    block.shrink({index: kept_U.nonzero().flatten().tolist() for index, kept_U in chosen.items()})
    touched = {name: group.units - keep[group.index] for group in groups for name in group.sites}
    return [
        _row(name, removed, _parameters(block, name), refitted.get(name)) for name, removed in sorted(touched.items())
    ]


def _row(name: str, removed: int, parameters: int, refitted: tuple[Refitted, int] | None) -> SiteReport:
    row = SiteReport(site=name, algorithm="modegpt", removed=removed, parameters=parameters)
    if refitted is None:
        return row
    new, tokens = refitted
    measured = {"error": new.error, "error_before": new.error_deleted, "tokens": tokens, "degraded": new.degraded}
    return row.model_copy(update=measured)


def _parameters(block: BlockWork, name: str) -> int:
    site = next(site for site in block.sites if site.name == name)
    return sum(parameter.numel() for parameter in site.module.parameters())
