"""Writes a report as a folder with report.html, report.md and report.json, complete or not at all; and reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmcompress.errors import CompressError, ExitCode, without_tokens
from llmcompress.records.evaluation import Comparison, Evaluation
from llmcompress.records.export_report import EXPORT_REPORT, ExportReport
from llmcompress.records.search import SearchReport
from llmcompress.report.comparing import comparison_document
from llmcompress.report.document import Document
from llmcompress.report.exported import export_document
from llmcompress.report.html import as_html
from llmcompress.report.markdown import as_markdown
from llmcompress.report.searched import search_document
from llmcompress.report.sections import document_of
from llmcompress.report.svg import require_plots
from llmcompress.storage.folder import check_output, publish, staging_folder
from llmcompress.storage.json_file import read_json
from llmcompress.storage.names import FILES
from llmcompress.storage.paths import from_home

HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"

Reported = Evaluation | Comparison | ExportReport | SearchReport

_DOCUMENTS: Mapping[type[Reported], Callable[[Any], Document]] = {
    Evaluation: document_of,
    Comparison: comparison_document,
    ExportReport: export_document,
    SearchReport: search_document,
}


def check_report_folder(folder: Path) -> None:
    """Before any work: that a report can be written there. An earlier report is replaced without asking.

    Raises: CompressError for a folder with anything else in it, or a missing library.
    """
    require_plots()
    check_output(folder, overwrite=_holds_a_report_only(folder))


def write_report(found: Reported, folder: str | Path) -> Path:
    """Write the three files; the folder appears in one step, in the place of an earlier report.

    Raises: CompressError as `check_report_folder` does, or for a full disk.
    """
    folder = from_home(str(folder))
    check_report_folder(folder)
    document = _DOCUMENTS[type(found)](found)
    texts = {
        HTML: as_html(document),
        MARKDOWN: as_markdown(document),
        JSON: found.model_dump_json(indent=1) + "\n",
    }
    with staging_folder(folder) as staging:
        for name, text in texts.items():
            (staging / name).write_text(shareable(text), encoding="utf-8")
        publish(staging, folder, overwrite=True)
    return folder


def read_reported(path: Path) -> Reported:
    """The evaluation or comparison in a report.json, the proof of an export, or those in a folder that has one.

    Raises: CompressError when there is none, or it is damaged.
    """
    file = _file_in(path) if path.is_dir() else path
    fix = "give a folder that `evaluate` or `compare` wrote with an output"
    data = read_json(file, code="report.unreadable", fix=fix)
    try:
        found: Reported = TypeAdapter(Reported).validate_python(data)
    except ValidationError as problem:
        what = f"{file.name} is not a report of this version of llmcompress: {problem.errors()[0]['msg']}"
        raise CompressError("report.unreadable", what, where=str(file), fix="evaluate the model again") from problem
    return found


def read_measured(path: Path) -> Evaluation | Comparison:
    """The same of models alone.

    Raises: CompressError as `read_reported` does, and for the proof of an export.
    """
    found = read_reported(path)
    if isinstance(found, ExportReport | SearchReport):
        what = "the proof of an export" if isinstance(found, ExportReport) else "the report on a search"
        raise CompressError(
            "report.kind",
            f"this is {what}; it measures no model beside another",
            where=str(path),
            fix="give a folder that `evaluate` or `compare` wrote with an output",
            exit_code=ExitCode.USAGE,
        )
    return found


def is_report(path: Path) -> bool:
    """Whether something is a saved report, and not a model: an exported folder is a model, whatever is proven of it."""
    return path.is_file() and path.suffix == ".json" if not path.is_dir() else (path / JSON).is_file()


def is_export(path: Path) -> bool:
    """Whether it is a folder that `export` wrote, with the proof of it."""
    return (path / EXPORT_REPORT).is_file()


def _file_in(folder: Path) -> Path:
    """An exported folder has no report.json, but the proof of its export."""
    return folder / (EXPORT_REPORT if is_export(folder) else JSON)


def shareable(text: str) -> str:
    """Without access tokens, and without the path of the user's home."""
    home = str(Path.home())
    return without_tokens(text.replace(home, "~") if len(home) > 1 else text)


def _holds_a_report_only(folder: Path) -> bool:
    try:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as problem:
        raise CompressError(
            "report.unreadable", f"the folder cannot be read: {problem.strerror}", where=str(folder),
            fix="choose another folder", exit_code=ExitCode.USAGE,
        ) from problem  # fmt: skip
    return bool(names) and names <= {HTML, MARKDOWN, JSON, FILES}
