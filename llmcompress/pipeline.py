"""The whole flow, in the order of the README: load → map → calibrate ⇄ compress → evaluate → save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import CalibrationData, calibration_windows
from llmcompress.calibration.devices import usable_device
from llmcompress.calibration.process_group import own_device, process_group
from llmcompress.calibration.sources import overlap_warning
from llmcompress.calibration.tokens import max_positions, refuse_beyond_embedding
from llmcompress.cost import Machine, Offload
from llmcompress.errors import without_tokens
from llmcompress.evaluation.coverage import coverage_warnings
from llmcompress.evaluation.dense import DenseScores, against_dense, dense_scores
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.evaluation.perplexity import measure
from llmcompress.evaluation.settings import BUNDLED_TEXT, PerplexityTask
from llmcompress.evaluation.speed import SpeedResult, speed_of
from llmcompress.evaluation.texts import EvaluationText, evaluation_text
from llmcompress.exporters.auxiliary_files import copy_auxiliary_files
from llmcompress.exporters.save import save_model
from llmcompress.loading.config import read_config
from llmcompress.loading.load import load_tokenizer
from llmcompress.loading.source import find_source
from llmcompress.model.describe import describe
from llmcompress.model.probe import probe
from llmcompress.passes.apply import apply_passes, steps
from llmcompress.passes.shared_resume_store import SharedResumeStore
from llmcompress.planning import Plan, make_plan, refused, within_target_limits
from llmcompress.preparation import CompressionRequest, Prepared, prepare
from llmcompress.presets import as_recipe
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import Recipe
from llmcompress.records.measurements import Measurement, PerplexityResult, StageSeconds, WeightBytes
from llmcompress.records.report import REPORT, Report
from llmcompress.records.rows import SiteReport
from llmcompress.run import Run
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.storage.cache import TensorCache, cache_folder
from llmcompress.storage.folder import publish, staging_folder

RECIPE = "llmcompress_recipe.yaml"
"""Saved beside the weights and the report: the resolved recipe that makes the same result again."""


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
    chosen = within_target_limits(as_recipe(recipe).for_model(model))
    where = own_device(usable_device(device))
    with process_group(where) as processes:
        request = CompressionRequest(
            recipe=chosen,
            output=Path(output),
            device=where,
            processes=processes,
            overwrite=overwrite,
            fresh=fresh,
            offload=offload,
            progress=progress if progress and processes.is_first else Silent(),
        )
        return _compress(request)


def _compress(request: CompressionRequest) -> Report:
    recipe, processes, clock = request.recipe, request.processes, Stopwatch()
    prepared = prepare(request)
    clock.lap("load")
    with _opened_run(request, prepared) as run:
        torch.manual_seed(recipe.seed)
        data = _calibration(request, prepared)
        clock.lap("calibration text")
        dense = _dense(request, prepared) if processes.is_first else []
        clock.lap("evaluate dense")
        request.progress.stage("compress", steps(recipe.passes, prepared.map))
        context = _context(request, prepared, data, run)
        model, rows = apply_passes(prepared.loaded.model, prepared.map, recipe.passes, context)
        clock.lap("compress")
        if run is None:  # the first process evaluates and writes
            return processes.broadcast(Report.model_construct())
        measured: list[Measurement] = [each.perplexity() for each in dense]
        with TorchRunner(model, weights_at=prepared.weights_at, device=request.device) as runner:
            measured += against_dense(runner, dense, request.progress)
        clock.lap("evaluate compressed")
        report = _report(request, prepared, data, rows).with_measurements([*measured, *clock.stages()])
        request.progress.stage("save", 1)
        report = _save(request, prepared, model, report)
        request.progress.step(request.output.name)
        run.discard()
    return processes.broadcast(report)


def _opened_run(request: CompressionRequest, prepared: Prepared) -> AbstractContextManager[Run | None]:
    """The run folder, in the first process alone."""
    if not request.processes.is_first:
        return nullcontext()
    recipe, model = request.recipe, prepared.loaded.source.name
    # what must not change between a killed run and its resumption, or the halves would not fit together
    short = {name: digest[:16] for name, digest in prepared.identity.items()}
    fingerprint = {"recipe": recipe.hash(), **short, "model": model, **versions()}
    run = Run.open(request.output, fingerprint=fingerprint, lock_text=recipe.to_yaml(), fresh=request.fresh)
    run.log("begun", model=model, recipe=recipe.hash(), saved=run.saved)
    return run


def _context(
    request: CompressionRequest, prepared: Prepared, data: CalibrationData | None, run: Run | None
) -> RunContext:
    return RunContext(
        data.windows_NT if data else torch.zeros(0, 1, dtype=torch.long),
        batch=request.recipe.calibration.batch,
        device=request.device,
        storage_dtype=prepared.storage_dtype,
        seed=request.recipe.seed,
        weights_at=prepared.weights_at,
        experts=request.recipe.calibration.experts,
        processes=request.processes,
        keep=run if request.processes.count == 1 else SharedResumeStore(run, request.processes),
        progress=request.progress,
    )


def _dense(request: CompressionRequest, prepared: Prepared) -> list[DenseScores]:
    """What the model says of every text before anything is done to it."""
    known = versions()
    return dense_scores(
        prepared.texts,
        lambda: TorchRunner(prepared.loaded.model, weights_at=prepared.weights_at, device=request.device),
        # offloaded weights compute in float32, whatever the files hold
        model={
            **prepared.identity,
            "dtype": "float32",
            "device": request.device.type,
            **{name: known[name] for name in ("torch", "transformers")},
        },
        cache=TensorCache(cache_folder() / "scores"),
        progress=request.progress,
    )


def _report(
    request: CompressionRequest, prepared: Prepared, data: CalibrationData | None, rows: Sequence[SiteReport]
) -> Report:
    loaded, texts = prepared.loaded, prepared.texts
    about_data = [*data.warnings, *_overlaps(data, texts), *coverage_warnings(rows, prepared.map)] if data else []
    about_texts = [f"{text.name}: {warning}" for text in texts for warning in text.warnings]
    return Report(
        model=loaded.source.name,
        recipe_hash=request.recipe.hash(),
        versions=versions(),
        machine=machine(),
        calibration_tokens=data.tokens if data else 0,
        sites=tuple(rows),
        refused=refused(prepared.map),
        measurements=(WeightBytes(of="dense", bytes=bytes_on_disk(loaded.source.folder)),),
        warnings=tuple(dict.fromkeys([*loaded.preflight.warnings, *prepared.notes, *about_data, *about_texts])),
    )


def _save(request: CompressionRequest, prepared: Prepared, model: PreTrainedModel, report: Report) -> Report:
    """Write everything into a folder beside the output, then move it there in one step."""
    recipe, loaded = request.recipe, prepared.loaded
    with staging_folder(request.output) as staging:
        save_model(
            model,
            staging,
            recipe.save.format,
            storage_dtype=prepared.storage_dtype,
            max_shard_size=recipe.save.max_shard_size,
            zero_points=recipe.save.zero_points,
            weights_at=prepared.weights_at,
        )
        copy_auxiliary_files(loaded.source.folder, staging, loaded.tokenizer, loaded.preflight.generation_config)
        finished = report.with_measurements([WeightBytes(of="compressed", bytes=bytes_on_disk(staging))])
        (staging / RECIPE).write_text(without_tokens(recipe.to_yaml()), encoding="utf-8")
        (staging / REPORT).write_text(without_tokens(finished.model_dump_json(indent=1)) + "\n", encoding="utf-8")
        publish(staging, request.output, overwrite=request.overwrite)
    return finished


def plan(
    model: str | None, recipe: Recipe | str | Path, *, offload: Offload = "auto", machine: Machine | None = None
) -> Plan:
    """What `compress` would do: sites, bytes, memory, and on `machine` time. Reads config and headers, no weights.

    Raises: CompressError for what `compress` would refuse.
    """
    chosen = within_target_limits(as_recipe(recipe).for_model(model))
    source = find_source(str(chosen.model), revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    return make_plan(source, chosen, offload=offload, machine=machine)


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
    runner: str = "torch",
    device: str = "auto",
    progress: Progress | None = None,
) -> list[PerplexityResult]:
    """Measure a dense or compressed model on every text of `tasks` (the bundled one), run by any runtime.

    Raises: CompressError when the model or a text cannot be read, or there is no such runtime.
    """
    tokenizer = load_tokenizer(find_source(model))
    with RUNNERS[runner].open(model, device=usable_device(device), dtype=torch.float32) as opened:
        texts = [evaluation_text(task, tokenizer, opened.max_positions) for task in tasks]
        for text in texts:
            refuse_beyond_embedding(text.windows, tokenizer, opened.vocabulary, where=text.name)
        return [measure(opened, text, progress=progress) for text in texts]


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
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def stages(self) -> list[StageSeconds]:
        """All laps."""
        return [StageSeconds(stage=name, seconds=seconds) for name, seconds in self._seconds.items()]


def _calibration(request: CompressionRequest, prepared: Prepared) -> CalibrationData | None:
    recipe, loaded = request.recipe, prepared.loaded
    if not any(each.uses_data() for each in recipe.passes):
        return None
    with prepared.weights_at.running(loaded.model, torch.device("cpu")):
        data = calibration_windows(
            recipe.calibration,
            loaded.tokenizer,
            max_positions=max_positions(loaded.model.config),
            seed=recipe.seed,
            model=loaded.model,
            progress=request.progress,
        )
    rows = loaded.preflight.contents.embedding_rows
    refuse_beyond_embedding(data.windows_NT, loaded.tokenizer, rows, where=f"calibration: {data.source}")
    return data


def _overlaps(data: CalibrationData, texts: Sequence[EvaluationText]) -> list[str]:
    found = (
        overlap_warning(data.paragraphs, text.paragraphs, calibration_name=data.source, evaluation_name=text.name)
        for text in texts
    )
    return [warning for warning in found if warning]
