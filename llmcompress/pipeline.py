"""The whole flow, in the order of the README: load → map → calibrate ⇄ compress → evaluate → save."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import CalibrationData, calibration_windows
from llmcompress.calibration.devices import usable_device
from llmcompress.calibration.homes import Home, InMemory, OnDisk
from llmcompress.calibration.ranks import Ranks, all_ranks, own_device
from llmcompress.calibration.sources import overlap_warning
from llmcompress.calibration.tokens import max_positions
from llmcompress.cost import Offload, must_offload
from llmcompress.evaluation.coverage import coverage_warnings
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.evaluation.perplexity import EvaluationText, evaluation_text, measure
from llmcompress.evaluation.settings import BUNDLED_TEXT, PerplexityTask
from llmcompress.evaluation.speed import SpeedResult, speed_of
from llmcompress.export.companions import companions
from llmcompress.export.loader import loader_of
from llmcompress.export.save import save_model
from llmcompress.loading.config import read_config
from llmcompress.loading.load import Loaded, load, load_for_compression
from llmcompress.loading.source import Source, find_source
from llmcompress.model.describe import describe
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.probe import map_model, probe
from llmcompress.passes.apply import apply_passes, steps
from llmcompress.passes.together import Together
from llmcompress.planning import Plan, aimed_at_target, check_recipe, make_plan, refused, storage_dtype_of
from llmcompress.presets import as_recipe
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import Recipe
from llmcompress.records.report import PerplexityResult, Quality, Report
from llmcompress.run import Run
from llmcompress.storage.folder import check_output, publish, run_folder, staging_folder

REPORT = "llmcompress_report.json"
RECIPE = "llmcompress_recipe.yaml"
"""Saved beside the weights: the evidence, and the resolved recipe that makes the same result again."""


def compress(
    model: str | None,
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    offload: Offload = "auto",
    progress: Progress | None = None,
) -> Report:
    """Compress a model and save it as a Hugging Face folder.

    `model` is a Hub id, a folder or `builtin:books-llama` (None: the recipe names it); `recipe` a `Recipe`, a file or
    the name of a preset. Beside `output` a folder `<output>.run` keeps finished blocks until all is done: a killed run
    started again goes on where it was, unless `fresh`. An existing `output` is only replaced with `overwrite`, after
    its successor is complete. With `offload` the weights stay on disk and one block at a time is in memory (auto: when
    the whole model would not fit). Processes that `torchrun` started share the calibration windows; the first one
    evaluates and writes, all return the report.

    Raises: CompressError for everything a user can cause.
    """
    chosen = aimed_at_target(as_recipe(recipe).for_model(model))
    where = own_device(usable_device(device))
    with all_ranks(where) as ranks:
        return _compress(
            chosen,
            Path(output),
            where,
            ranks,
            overwrite=overwrite,
            fresh=fresh,
            offload=offload,
            progress=progress if progress and ranks.is_first else Silent(),
        )


def _compress(
    chosen: Recipe,
    output: Path,
    where: torch.device,
    ranks: Ranks,
    *,
    overwrite: bool,
    fresh: bool,
    offload: Offload,
    progress: Progress,
) -> Report:
    clock = Stopwatch()
    if ranks.is_first:
        check_output(output, overwrite=overwrite)
    progress.stage("load", 1)
    source = find_source(str(chosen.model), revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    # a finished folder is no larger than the model; better refused now than when it is written
    if ranks.is_first:
        check_output(output, overwrite=overwrite, needed_bytes=bytes_on_disk(source.folder))
    on_disk = must_offload(offload, chosen.passes, weight_bytes=bytes_on_disk(source.folder), processes=ranks.count)
    loaded = load_for_compression(
        source,
        trust_remote_code=chosen.trust_remote_code,
        scratch=run_folder(output) / "converted" if on_disk else None,
        progress=progress,
    )
    home: Home = InMemory() if loaded.weights is None else OnDisk(loaded.weights)
    unfuse_experts(loaded.model, loaded.weights)
    model_map = map_model(loaded.model)
    storage_dtype = storage_dtype_of(chosen, loaded.preflight)
    notes = check_recipe(chosen, model_map, loader_of(loaded.model.config), storage_dtype).notes
    texts = [evaluation_text(task, loaded.tokenizer, loaded.model.config) for task in chosen.evaluate]
    clock.lap("load")

    opened = (
        Run.open(output, fingerprint=_fingerprint(chosen, source), lock_text=chosen.to_yaml(), fresh=fresh)
        if ranks.is_first
        else nullcontext()
    )
    with opened as run:
        if run:
            run.log("begun", model=source.name, recipe=chosen.hash(), saved=run.saved)
        torch.manual_seed(chosen.seed)
        data = _calibration(chosen, loaded, home, progress)
        clock.lap("calibration text")
        dense = ranks.same(_measure(loaded.model, texts, where, progress, home) if ranks.is_first else [])
        clock.lap("evaluate dense")
        progress.stage("compress", steps(chosen.passes, model_map))
        context = RunContext(
            data.windows_NT if data else torch.zeros(0, 1, dtype=torch.long),
            batch=chosen.calibration.batch,
            device=where,
            storage_dtype=storage_dtype,
            seed=chosen.seed,
            home=home,
            experts=chosen.calibration.experts,
            ranks=ranks,
            keep=run if ranks.count == 1 else Together(run, ranks),
            progress=progress,
        )
        model, rows = apply_passes(loaded.model, model_map, chosen.passes, context)
        clock.lap("compress")
        if run is None:  # the first process evaluates and writes
            return ranks.same(Report.model_construct())
        after = _measure(model, texts, where, progress, home)
        clock.lap("evaluate compressed")
        about_data = [*data.warnings, *_overlaps(data, texts), *coverage_warnings(rows, model_map)] if data else []
        about_texts = [f"{text.name}: {warning}" for text in texts for warning in text.warnings]
        report = Report(
            model=source.name,
            recipe_hash=chosen.hash(),
            versions=versions(),
            machine=machine(),
            calibration_tokens=data.tokens if data else 0,
            sites=tuple(rows),
            refused=refused(model_map),
            quality=tuple(Quality(dense=a, compressed=b) for a, b in zip(dense, after, strict=True)),
            bytes_dense=bytes_on_disk(source.folder),
            bytes_compressed=0,
            seconds=clock.seconds,
            warnings=tuple(dict.fromkeys([*loaded.preflight.warnings, *notes, *about_data, *about_texts])),
        )
        progress.stage("save", 1)
        report = _save(
            chosen, model, loaded, report, output, storage_dtype=storage_dtype, overwrite=overwrite, home=home
        )
        progress.step(output.name)
        run.discard()
    return ranks.same(report)


def _save(
    recipe: Recipe,
    model: PreTrainedModel,
    loaded: Loaded,
    report: Report,
    output: Path,
    *,
    storage_dtype: torch.dtype,
    overwrite: bool,
    home: Home,
) -> Report:
    """Write everything into a folder beside the output, then move it there in one step."""
    with staging_folder(output) as staging:
        save_model(
            model,
            staging,
            recipe.save.format,
            storage_dtype=storage_dtype,
            max_shard_size=recipe.save.max_shard_size,
            zero_points=recipe.save.zero_points,
            home=home,
        )
        companions(loaded.source.folder, staging, loaded.tokenizer, loaded.preflight.generation_config)
        finished = report.model_copy(update={"bytes_compressed": bytes_on_disk(staging)})
        (staging / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        (staging / REPORT).write_text(finished.model_dump_json(indent=1) + "\n", encoding="utf-8")
        publish(staging, output, overwrite=overwrite)
    return finished


def _fingerprint(recipe: Recipe, source: Source) -> dict[str, str]:
    """What must not change between a killed run and its resumption, or the halves would not fit together."""
    weights = hashlib.sha256()
    for path in sorted(source.folder.glob("*.safetensors")):
        with path.open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    config = hashlib.sha256((source.folder / "config.json").read_bytes())
    return {
        "recipe": recipe.hash(),
        "weights": weights.hexdigest()[:16],
        "config": config.hexdigest()[:16],
        "model": source.name,
        **versions(),
    }


def plan(model: str | None, recipe: Recipe | str | Path, *, offload: Offload = "auto") -> Plan:
    """What `compress` would do: sites, bytes, memory, time. Reads config and headers, no weights.

    Raises: CompressError for what `compress` would refuse.
    """
    chosen = aimed_at_target(as_recipe(recipe).for_model(model))
    source = find_source(str(chosen.model), revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    return make_plan(source, chosen, offload=offload)


def inspect(model: str) -> dict[str, Any]:
    """The model map: blocks, sites, shared inputs, folds, width groups, and what cannot be compressed and why.

    Raises: CompressError when there is no such model or its structure is not understood.
    """
    source = find_source(model)
    config, _ = read_config(source.folder)
    return describe(probe(config, unfuse=True))


def evaluate(
    model: str,
    tasks: Sequence[PerplexityTask] = BUNDLED_TEXT,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[PerplexityResult]:
    """Measure a dense or compressed model on every text of `tasks`, by default the bundled one.

    Raises: CompressError when the model or a text cannot be read.
    """
    where = usable_device(device)
    live, tokenizer = load(model, dtype=torch.float32, device=where)
    texts = [evaluation_text(task, tokenizer, live.config) for task in tasks]
    return _measure(live, texts, where, progress or Silent(), InMemory())


def speed(
    models: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, SpeedResult]:
    """Tokens per second of dense or compressed models, measured in turns; `dtype` auto: float32 on a CPU.

    Raises: CompressError when a model cannot be read.
    """
    return speed_of(
        models,
        device=usable_device(device),
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )


class Stopwatch:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _calibration(recipe: Recipe, loaded: Loaded, home: Home, progress: Progress) -> CalibrationData | None:
    if not any(each.uses_data() for each in recipe.passes):
        return None
    with home.running(loaded.model, torch.device("cpu")):
        return calibration_windows(
            recipe.calibration,
            loaded.tokenizer,
            max_positions=max_positions(loaded.model.config),
            seed=recipe.seed,
            model=loaded.model,
            progress=progress,
        )


def _measure(
    model: PreTrainedModel, texts: Sequence[EvaluationText], device: torch.device, progress: Progress, home: Home
) -> list[PerplexityResult]:
    with home.running(model, device):
        return [measure(model, text, device=device, progress=progress) for text in texts]


def _overlaps(data: CalibrationData, texts: Sequence[EvaluationText]) -> list[str]:
    found = (
        overlap_warning(data.paragraphs, text.paragraphs, calibration_name=data.source, evaluation_name=text.name)
        for text in texts
    )
    return [warning for warning in found if warning]
