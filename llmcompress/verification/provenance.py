"""Whether recipe, report and files tell of the same run, and where the model came from."""

from __future__ import annotations

from pathlib import Path

from llmcompress.evaluation.environment import versions
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.recipe.document import read_file
from llmcompress.recipe.model import hash_of
from llmcompress.records.export_report import EXPORT_REPORT, ExportReport
from llmcompress.records.report import RECIPE, REPORT, Report, read_report
from llmcompress.records.verification import Check
from llmcompress.storage.json_file import read_json
from llmcompress.storage.ownership import written_files

_NO_REPORT = f"no {REPORT}: another program made this model"


def recipe(folder: Path) -> Check:
    """The recipe beside the weights is the one that the report was made with, and the bytes are those it counts."""
    report = _report(folder)
    if report is None:
        return Check(name="recipe", result="skipped", found=_NO_REPORT)
    if not (folder / RECIPE).is_file():
        return Check(name="recipe", result="failed", found=f"there is a report and no {RECIPE}", where=(RECIPE,))
    found = hash_of(read_file(folder / RECIPE).data)
    if found != report.recipe_hash and not _is_of_this_version(folder, report):
        return Check(name="recipe", result="skipped", found="another version of llmcompress hashed the recipe")
    if found != report.recipe_hash:
        what = f"the recipe has the hash {found}, the report is of {report.recipe_hash}"
        return Check(name="recipe", result="failed", found=what, where=(RECIPE, REPORT))
    if report.bytes_compressed and not (folder / EXPORT_REPORT).is_file():
        there = bytes_on_disk(folder)
        if there != report.bytes_compressed:
            what = f"the weight files have {there:,} bytes, the report says {report.bytes_compressed:,}"
            return Check(name="recipe", result="failed", found=what, where=(REPORT,))
    return Check(name="recipe", result="ok", found=f"recipe {found}, as the report says")


def export(folder: Path) -> Check:
    """Of an export: everything that was read back after writing was the model's."""
    if not (folder / EXPORT_REPORT).is_file():
        return Check(name="export", result="skipped", found="no export: the folder that `compress` wrote")
    found = ExportReport.model_validate(read_json(folder / EXPORT_REPORT, code="report.unreadable"))
    if found.differing:
        names = tuple(row.source for row in found.differing[:12])
        what = f"{len(found.differing)} of {len(found.read_back)} tensors differed from the model when it was exported"
        return Check(name="export", result="failed", found=what, where=names)
    if not found.read_back:
        return Check(name="export", result="skipped", found=f"the target {found.target} is not read back")
    what = f"{len(found.read_back)} tensors were read back and equal the model's"
    return Check(name="export", result="ok", found=what)


def origin(folder: Path) -> Check:
    """Which model it was made from, and by what."""
    report = _report(folder)
    if report is None:
        return Check(name="origin", result="skipped", found=_NO_REPORT)
    commit = report.base.get("commit")
    at = f" at commit {commit}" if commit else ""
    by = f"llmcompress {report.versions.get('llmcompress', 'of an unknown version')}"
    digest = report.base.get("weights")
    weights = f", weights {digest[:16]}" if digest else ""
    return Check(name="origin", result="ok", found=f"made from {report.model}{at}{weights}, by {by}")


def _is_of_this_version(folder: Path, report: Report) -> bool:
    """What a hash leaves out may differ between versions; the first ones wrote no digests."""
    return report.versions.get("llmcompress") == versions()["llmcompress"] and any(written_files(folder).values())


def _report(folder: Path) -> Report | None:
    return read_report(folder) if (folder / REPORT).is_file() else None
