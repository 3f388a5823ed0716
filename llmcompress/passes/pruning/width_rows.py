"""Rows of the report for linears of which rows and columns go."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.units import UnitGroup
from llmcompress.numerics.refit import Refitted
from llmcompress.records.rows import SiteReport


def rows_of_smaller(
    algorithm: str, block: BlockWork, kept: Mapping[UnitGroup, Tensor], refitted: Mapping[str, Refitted]
) -> list[SiteReport]:
    """One row per site that becomes smaller."""
    rows = []
    for site in block.sites:
        sizes = {"rows": site.info.outputs, "columns": site.info.inputs}
        removed = 0
        for group, units in kept.items():
            for part in group.parts:
                if part.site == site.info.name:
                    stay = set(units.tolist())
                    gone = (len(indices) for unit, indices in enumerate(part.indices) if unit not in stay)
                    sizes[part.axis] -= sum(gone)
                    removed += group.units - len(stay)
        if not removed:
            continue
        new = refitted.get(site.name)
        biases = 0 if site.bias_O is None else sizes["rows"]
        rows.append(
            SiteReport(
                site=site.name,
                algorithm=algorithm,
                error=new.error if new else None,
                error_before=new.error_deleted if new else None,
                parameters=sizes["rows"] * sizes["columns"] + biases,
                removed=removed,
                degraded=new.degraded if new else None,
            )
        )
    return rows
