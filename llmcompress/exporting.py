"""Exports a finished model for one target: written, read back, compared, and published as a folder in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration.offloading import InMemory, WeightStore
from llmcompress.errors import NOTHING_SAVED, CompressError, ExitCode, without_tokens
from llmcompress.exporters.auxiliary_files import copy_auxiliary_files
from llmcompress.exporters.base import EXPORTERS, Converted, Exporter, Writing
from llmcompress.exporters.choose import check_export
from llmcompress.exporters.contents import Contents, contents_in
from llmcompress.exporters.readme import README, readme
from llmcompress.exporters.runtime_proof import runtime_proof
from llmcompress.progress import Progress, Silent
from llmcompress.records.export_report import EXPORT_REPORT, ExportReport, RuntimeProof
from llmcompress.storage.folder import publish, set_aside, staging_folder

Proof = Callable[[Path], RuntimeProof | None]
"""Runs a folder in the target's own runtime; None: that is not installed."""


@dataclass(frozen=True)
class Exportable:
    """A finished model, in float32 on the CPU, and what goes with it into a folder of any target."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """What the user calls it."""
    storage_dtype: torch.dtype
    generation_config: GenerationConfig
    source_folder: Path | None = None
    """Where tokenizer files, licence and the like are copied from; None: they are written from the objects."""
    weights_at: WeightStore = field(default_factory=InMemory)
    beside: Mapping[str, str] = field(default_factory=dict)
    """Further files and their text: the recipe, the report."""
    max_shard_size: str = "5GB"
    progress: Progress = field(default_factory=Silent)
    """Shows what the tools of a target do."""

    @property
    def contents(self) -> Contents:
        """As exporters see it."""
        return contents_in(self.model, self.storage_dtype)

    @property
    def writing(self) -> Writing:
        """How its files are written."""
        return Writing(
            self.storage_dtype,
            self.max_shard_size,
            self.weights_at,
            tokenizer=self.tokenizer,
            model_name=self.name,
            progress=self.progress,
        )


def exporter_called(name: str, options: Mapping[str, Any] | None = None) -> Exporter:
    """The exporter of that name with these options.

    Raises: CompressError for a name or an option that there is not.
    """
    kind = EXPORTERS[name]
    try:
        return kind.model_validate(dict(options or {}))
    except ValidationError as problem:
        first = problem.errors()[0]
        known = ", ".join(kind.model_fields) or "none"
        raise CompressError(
            "export.option",
            f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            fix=f"its options are: {known}",
            exit_code=ExitCode.USAGE,
        ) from problem


def export_folders(output: Path, exporters: Sequence[Exporter]) -> dict[Exporter, Path]:
    """Where a recipe's exports go: beside the output, under its name and the target's."""
    return {each: output.with_name(f"{output.name}-{EXPORTERS.name_of(type(each))}") for each in exporters}


def export(
    exportable: Exportable, exporter: Exporter, output: Path, *, overwrite: bool, proof: Proof | None = None
) -> ExportReport:
    """Write the folder of a target; the folder appears complete, and only if it reads back as what was written.

    `proof` runs the written files before they are published.

    Raises: CompressError when the target cannot hold the model, or (exit code 6) when what is read back is not the
    model: the faulty folder is kept beside `output`.
    """
    contents = exportable.contents
    check_export(exporter, contents, saved=_IN_MEMORY)
    target, answers = EXPORTERS.name_of(type(exporter)), exporter.answers(contents)
    with staging_folder(output) as staging:
        writing = exportable.writing
        saved = exporter.write(exportable.model, staging, writing)
        copy_auxiliary_files(exportable.source_folder, staging, exportable.tokenizer, exportable.generation_config)
        report = ExportReport(
            target=target,
            model=without_tokens(exportable.name),
            bytes=sum((staging / name).stat().st_size for name in saved.weight_files),
            unpacked_bytes=saved.unpacked_bytes,
            read_back=tuple(exporter.read_back(exportable.model, staging, writing)),
            converted={name: each.why for name, each in answers.items() if isinstance(each, Converted)},
            notes=tuple(exporter.notes(contents, answers)),
            not_run=exporter.cannot_run,
        )
        if report.differing:
            raise _mismatch(report, set_aside(staging, output))
        if proof is not None:
            report = report.model_copy(update={"runtime": proof(staging)})
        for name, text in {
            **exportable.beside,
            EXPORT_REPORT: report.model_dump_json(indent=1) + "\n",
            README: readme(report, exporter),
        }.items():
            (staging / name).write_text(without_tokens(text), encoding="utf-8")
        publish(staging, output, overwrite=overwrite)
    return report


def export_beside(
    exportable: Exportable, exporters: Sequence[Exporter], output: Path, *, overwrite: bool, progress: Progress
) -> None:
    """For every target of a recipe; what is in memory is also run in the target's own runtime.

    Raises: CompressError as `export` does, when all other targets are written.
    """
    shown = replace(exportable, progress=progress)
    folders, written, failed = export_folders(output, exporters), list[Path](), list[CompressError]()
    if folders:
        progress.stage("export", len(folders))
    for exporter, folder in folders.items():
        in_memory = isinstance(exportable.weights_at, InMemory)
        proof = partial(runtime_proof, exportable.model, exportable.tokenizer, exporter) if in_memory else None
        try:
            export(shown, exporter, folder, overwrite=overwrite, proof=proof)
            written.append(folder)
        except CompressError as problem:
            progress.note(f"{folder.name} was not written: {problem.what}")
            failed.append(problem)
        progress.step(folder.name)
    if failed:
        first = failed[0]
        raise CompressError(
            first.code,
            first.what,
            where=first.where,
            fix=first.fix,
            saved=", ".join(map(str, (output, *written)))
            + (f"; {first.saved}" if first.saved != NOTHING_SAVED else ""),
            exit_code=first.exit_code,
        ) from first


_IN_MEMORY = "the model in memory"


def _mismatch(report: ExportReport, aside: Path) -> CompressError:
    rows = report.differing
    return CompressError(
        "export.mismatch",
        f"{len(rows)} of {len(report.read_back)} tensors of the {report.target} export are not what the model holds",
        where="; ".join(f"{row.source} ({row.stored_as})" for row in rows[:5]),
        fix="this is a bug in llmcompress or a faulty disk: please report it with the export report",
        saved=f"the faulty folder: {aside}",
        exit_code=ExitCode.GATE,
    )
