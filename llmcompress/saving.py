"""Saves a result as a folder: weights, tokenizer, recipe and report, first in a staging folder, then published in one
step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration.offloading import InMemory, WeightStore
from llmcompress.errors import CompressError, without_tokens
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.evaluation.gate import gate_failure
from llmcompress.exporters.auxiliary_files import copy_auxiliary_files
from llmcompress.exporters.base import Writing
from llmcompress.exporters.choose import choose
from llmcompress.exporters.contents import contents_in
from llmcompress.exporters.save import save_model
from llmcompress.exporters.shards import ShardSizes
from llmcompress.exporting import Exportable, export_beside
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.records.evaluation import Compression
from llmcompress.records.measurements import WeightBytes
from llmcompress.records.report import RECIPE, REPORT, Report, read_report
from llmcompress.storage.folder import publish, staging_folder


@dataclass(frozen=True)
class Result:
    """A compressed model, in float32 on the CPU, and everything that is saved with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    report: Report
    storage_dtype: torch.dtype
    generation_config: GenerationConfig
    source_folder: Path | None = None
    """Where tokenizer files, licence and the like are copied from; None: they are written from the objects."""
    weights_at: WeightStore = field(default_factory=InMemory)

    @property
    def exportable(self) -> Exportable:
        """The same for any target, with the recipe and the report beside it."""
        beside = {RECIPE: self.recipe.to_yaml(), REPORT: self.report.model_dump_json(indent=1) + "\n"}
        return Exportable(
            model=self.model,
            tokenizer=self.tokenizer,
            name=self.report.model,
            storage_dtype=self.storage_dtype,
            generation_config=self.generation_config,
            source_folder=self.source_folder,
            weights_at=self.weights_at,
            beside=beside,
            max_shard_size=self.recipe.save.max_shard_size,
        )

    def measured(self, bytes_written: int) -> Report:
        """The report with the bytes of the weight files, and the hash of the recipe that is saved beside it."""
        others = [each for each in self.report.measurements if each != _compressed_bytes(self.report)]
        kept = self.report.model_copy(update={"measurements": tuple(others), "recipe_hash": self.recipe.hash()})
        return kept.with_measurements([WeightBytes(of="compressed", bytes=bytes_written)])


def publish_result(result: Result, output: Path, *, overwrite: bool) -> Report:
    """Fill a staging folder, then move it to `output` in one step; returns the saved report.

    Raises: CompressError if the format cannot represent the model, or `output` cannot be written or replaced.
    """
    with staging_folder(output) as staging:
        finished = fill_folder(result, staging)
        publish(staging, output, overwrite=overwrite)
    return finished


def save_run(result: Result, output: Path, *, overwrite: bool, progress: Progress) -> Report:
    """The folder, and the exports that the recipe asks for: unless its quality gate was not kept.

    Raises: CompressError as `publish_result` and `export` do.
    """
    progress.stage("save", 1)
    report = publish_result(result, output, overwrite=overwrite)
    progress.step(output.name)
    if gate_failure(report, saved=str(output)) is None:
        export_beside(result.exportable, result.recipe.export, output, overwrite=overwrite, progress=progress)
    return report


def bytes_to_write(result: Result) -> int:
    """The size of the weight files, packed as for a folder but only counted.

    Raises: CompressError if the format of the recipe cannot represent the model.
    """
    sizes = ShardSizes(result.recipe.save.max_shard_size)
    wanted, contents = result.recipe.save, contents_in(result.model, result.storage_dtype)
    exporter = choose(wanted.format, contents, zero_points=wanted.zero_points).exporter
    exporter.write(result.model, Path("unwritten"), Writing(result.storage_dtype, sizes=sizes))
    return sizes.file_bytes


def fill_folder(result: Result, folder: Path) -> Report:
    """Write everything into an empty folder, in the recipe's format.

    Raises: CompressError if the format cannot represent the model.
    """
    recipe = result.recipe
    save_model(
        result.model,
        folder,
        recipe.save.format,
        storage_dtype=result.storage_dtype,
        max_shard_size=recipe.save.max_shard_size,
        zero_points=recipe.save.zero_points,
        weights_at=result.weights_at,
    )
    copy_auxiliary_files(result.source_folder, folder, result.tokenizer, result.generation_config)
    finished = result.measured(bytes_on_disk(folder))
    (folder / RECIPE).write_text(without_tokens(recipe.to_yaml()), encoding="utf-8")
    (folder / REPORT).write_text(without_tokens(finished.model_dump_json(indent=1)) + "\n", encoding="utf-8")
    return finished


def saved_compression(folder: Path) -> Compression | None:
    """How the model in a folder was made; None where no readable report says so."""
    try:
        report = read_report(folder)
    except CompressError:
        return None
    recipe = folder / RECIPE
    return report.compression(recipe.read_text(encoding="utf-8") if recipe.is_file() else None)


def _compressed_bytes(report: Report) -> WeightBytes | None:
    return next((each for each in report.of_kind(WeightBytes) if each.of == "compressed"), None)
