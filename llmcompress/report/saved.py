"""The report beside the weights of a compressed model, as an evaluation."""

from __future__ import annotations

from pathlib import Path

from llmcompress.records.evaluation import Evaluation
from llmcompress.records.report import RECIPE, read_report


def evaluation_of_result(folder: Path) -> Evaluation:
    """What `compress` measured before and after, and how the model was made.

    Raises: CompressError when there is no such report, or it is damaged.
    """
    report = read_report(folder)
    recipe = folder / RECIPE
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    return Evaluation(
        model=folder.absolute().name,
        baseline=report.model,
        runner="torch",
        versions=report.versions,
        machine=report.machine,
        measurements=report.measurements,
        warnings=report.warnings,
        compression=report.compression(text),
    )
