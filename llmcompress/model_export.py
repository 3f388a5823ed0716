"""`export`: any model, in memory or in a folder, as the files of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.compressed_model import CompressedModel, ModelLike, in_memory, tokenizer_beside
from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.choose import check_export
from llmcompress.exporters.runtime_proof import runtime_proof
from llmcompress.exporting import Exportable, exporter_called
from llmcompress.exporting import export as export_one
from llmcompress.loading.borrowed import borrowed, is_loaded_quantized
from llmcompress.loading.in_memory import required_tokenizer
from llmcompress.loading.source import IN_MEMORY
from llmcompress.progress import ProgressLike, as_progress
from llmcompress.records.export_report import ExportReport
from llmcompress.reopening import reopen
from llmcompress.storage.folder import check_output
from llmcompress.storage.paths import from_home


def export(
    model: ModelLike,
    to: str | Sequence[str],
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    run: bool = True,
    memory: bool = False,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> dict[str, ExportReport]:
    """Write a model for one target, or for several: each into its own folder below `output`.

    `model`: a folder that `compress` saved, a dense model, a model in memory (with its `tokenizer`), or what `compress`
    returned. Codes and scales are carried, not rounded again. `options`: of each target, by its name. Every file is
    decoded again and compared before the folder appears; with `run` it is also run by the target's own runtime, if that
    is installed, and with `memory` once more in a fresh process, whose peak memory the report states.
    What a target cannot hold is refused before anything is written.

    Raises: CompressError for everything a user can cause; with exit code 6 where what was written is not the model.
    """
    targets, given = [to] if isinstance(to, str) else list(dict.fromkeys(to)), dict(options or {})
    unknown = given.keys() - set(targets)
    if unknown or not targets:
        raise CompressError(
            "export.option",
            f"options are given for {', '.join(sorted(unknown))}, which is no target here" if unknown else "no target",
            fix=f"the targets are: {', '.join(targets)}" if targets else "name one: `llmcompress targets` lists them",
            exit_code=ExitCode.USAGE,
        )
    exporters = {name: exporter_called(name, given.get(name)) for name in targets}
    folders = {name: Path(output) if len(targets) == 1 else Path(output) / name for name in targets}
    source = from_home(str(model)) if isinstance(model, str | Path) else None
    for folder in folders.values():
        check_output(folder, overwrite=overwrite, source=source)
    shown, made = as_progress(progress), dict[str, ExportReport]()
    shown.stage("open", 1)
    exportable, live = _exportable(model, tokenizer)
    exportable = replace(exportable, progress=shown)
    with borrowed(live):
        for exporter in exporters.values():
            check_export(exporter, exportable.contents)
        shown.stage("export", len(targets))
        for name, exporter in exporters.items():
            tried = partial(runtime_proof, exportable.model, exportable.tokenizer, exporter, with_memory=memory)
            proof = tried if run else None
            made[name] = export_one(exportable, exporter, folders[name], overwrite=overwrite, proof=proof)
            shown.step(name)
    return made


def _exportable(model: ModelLike, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Exportable, PreTrainedModel]:
    """The model, and the same to be borrowed while it is written."""
    if isinstance(model, CompressedModel):
        found = model.exportable
        return found, found.model
    live = in_memory(model)
    if live is None:
        found = reopen(str(model))
        return found, found.model
    if is_loaded_quantized(live):
        raise CompressError(
            "export.loaded",
            "transformers has turned the codes of this model into modules of its own",
            fix="give the folder that it was loaded from",
            exit_code=ExitCode.USAGE,
        )
    found = Exportable(
        model=live,
        tokenizer=required_tokenizer(tokenizer or tokenizer_beside(model)),
        name=f"{IN_MEMORY}{type(live).__name__}",
        storage_dtype=live.dtype,
        generation_config=live.generation_config,
    )
    return found, live
