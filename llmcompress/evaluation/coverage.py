"""Warns if calibration did not reach every expert with enough tokens, or used paragraphs of the measured text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmcompress.calibration.sources import overlap_warning
from llmcompress.calibration.token_windows import CalibrationData
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.model.map import ModelMap
from llmcompress.records.rows import SiteReport


def coverage_warnings(rows: Iterable[SiteReport], model_map: ModelMap) -> list[str]:
    """One line when linears of experts were measured on fewer tokens than they have inputs.

    With fewer tokens than inputs, some directions are not measured, and rounding ignores them as without data.
    The tokens of each are in its report row.
    """
    inputs = {block.full(site.name): site.inputs for block in model_map.blocks for site in block.structure.sites}
    seen = {row.site: row.tokens for row in rows if row.tokens is not None and ".experts." in row.site}
    few = {site: tokens for site, tokens in seen.items() if tokens < inputs.get(site, 0)}
    if not few:
        return []
    least = min(few, key=few.__getitem__)
    line = (
        f"{len(few)} of {len(seen)} linears of experts saw fewer calibration tokens than they have inputs (fewest: "
        f"{least}, {few[least]} tokens for {inputs[least]} inputs): use more `calibration.samples`, or "
        "`calibration.experts: all` if the router neglects these experts"
    )
    return [line]


def overlap_warnings(data: CalibrationData, texts: Sequence[EvaluationText]) -> list[str]:
    """One line for every measured text that shares paragraphs with the calibration text."""
    found = (
        overlap_warning(data.paragraphs, text.paragraphs, calibration_name=data.source, evaluation_name=text.name)
        for text in texts
    )
    return [warning for warning in found if warning]
