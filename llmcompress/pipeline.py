"""The main entry points, in order of the flow: load → map → calibrate ⇄ compress → evaluate → save."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.devices import usable_device
from llmcompress.calibration.in_memory import as_calibration
from llmcompress.calibration.process_group import own_device, process_group
from llmcompress.calibration.token_windows import CalibrationData
from llmcompress.calibration.tokens import max_positions, refuse_beyond_embedding
from llmcompress.compressed_model import CompressedModel, ModelLike, in_memory, is_dense, live_model, named_models
from llmcompress.cost import Machine, Offload
from llmcompress.evaluation.beside import score_cache, text_warnings
from llmcompress.evaluation.corpora import corpus_warnings
from llmcompress.evaluation.coverage import coverage_warnings, overlap_warnings
from llmcompress.evaluation.device.cost import CostSettings, CostTable, Skipped, as_candidates, measure_costs, several
from llmcompress.evaluation.environment import machine, numeric_versions, versions
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.evaluation.gate import gate_of, judged
from llmcompress.evaluation.held_out import HeldOut, loss_increase, loss_warnings
from llmcompress.evaluation.inspection import inspect_folder
from llmcompress.evaluation.measuring import Observed, comparisons, observe, results
from llmcompress.evaluation.stopwatch import Stopwatch
from llmcompress.hub_upload import publish_run
from llmcompress.known_model import known_in_memory, known_model
from llmcompress.loading.borrowed import lent, told_if_changed
from llmcompress.loading.source import IN_MEMORY, find_source
from llmcompress.model.describe import describe
from llmcompress.model.probe import map_model, probe
from llmcompress.passes.apply import apply_passes, steps
from llmcompress.passes.shared_resume_store import shared
from llmcompress.planning import Plan, make_plan, refused, within_target_limits
from llmcompress.preparation import CompressionRequest, Prepared, estimate, examples_of, prepare, teachers_of
from llmcompress.presets import RecipeLike, as_recipe
from llmcompress.progress import ProgressLike, Silent, as_progress
from llmcompress.records.degraded import degraded_warnings
from llmcompress.records.measurements import Measurement, WeightBytes
from llmcompress.records.report import Report
from llmcompress.records.rows import SiteReport
from llmcompress.run import Run
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.saving import Result, bytes_to_write, save_run
from llmcompress.trial_run import Bench, with_trial


def compress(
    model: ModelLike | None,
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Any = None,
    device: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    offload: Offload = "auto",
    progress: ProgressLike = None,
) -> CompressedModel:
    """Compress a model; in memory, or with `output` into a Hugging Face folder.

    `model`: a Hub id, a folder, `builtin:books-llama`, None (the recipe names it), or a dense transformers model in
    memory with its `tokenizer`. A model in memory is changed in place, without a second copy: the result has its
    device, dtype and mode, and an error during compression leaves it partly changed.

    `recipe`: a preset's name, a file, a dictionary, YAML or JSON text, a `Recipe`, one pass, or a list of passes.
    `calibration`: None (the recipe's), texts, conversations, a `datasets.Dataset`, batches of `input_ids` (with
    `attention_mask` where they are padded), or settings; data in memory appear in the recipe only by kind and hash.

    Without `output` nothing is written except the cache of dense scores. With it, a folder `<output>.run` saves
    finished blocks until all is done: an interrupted run resumes when started again, unless `fresh`. An existing
    `output` is only replaced with `overwrite`, once the new one is complete. With `offload` the weights stay on disk
    and one block at a time is in memory (auto: if the whole model would not fit). Under `torchrun` the processes share
    the calibration windows; the first one evaluates and writes.

    `progress`: a function of one `ProgressEvent`, "bar", or a `Progress`; messages go to the logger "llmcompress" too.

    Raises: CompressError for everything a user can cause.
    """
    live = live_model(model, tokenizer)
    chosen = as_recipe(recipe).for_model(live.name if live else None if model is None else str(model))
    settings, given = as_calibration(calibration, chosen.calibration, held_out=chosen.guard.windows)
    where = own_device(usable_device(device))
    chosen = within_target_limits(chosen.model_copy(update={"calibration": settings.settled(where)}))
    with process_group(where) as processes, lent(live.model if live else None) as give_back:
        request = CompressionRequest(
            recipe=chosen,
            output=None if output is None else Path(output),
            live=live,
            given=given,
            device=where,
            processes=processes,
            overwrite=overwrite,
            fresh=fresh,
            offload=offload,
            progress=as_progress(progress) if processes.is_first else Silent(),
        )
        made = _compress(request)
        give_back(made.model, made.storage_dtype)
    return made


def _compress(request: CompressionRequest) -> CompressedModel:
    clock = Stopwatch()
    prepared = prepare(request)
    request = replace(request, recipe=prepared.recipe)
    recipe, processes = request.recipe, request.processes
    clock.lap("load")
    request.progress.note(estimate(prepared, request.device))
    with _opened_run(request, prepared) as run:
        torch.manual_seed(recipe.seed)
        data = _calibration(request, prepared)
        clock.lap("calibration text")
        held_out = HeldOut(data.held_out_NT if data else None, prepared.weights_at, request.device)
        before = held_out.dense_scores(prepared.loaded.model) if processes.is_first else []
        dense = _dense(request, prepared) if processes.is_first else []
        clock.lap("evaluate dense")
        context = _context(request, prepared, data, run)
        request.progress.stage("compress", steps(recipe.passes, prepared.map))
        with told_if_changed(request.live is not None):
            model, rows = apply_passes(prepared.loaded.model, prepared.map, recipe.passes, context)
        clock.lap("compress")
        measured = results(dense, "dense")
        if processes.is_first:  # it evaluates and writes
            measured += _compared(request, prepared, model, dense)
            measured += loss_increase(before, held_out.scores(model))
            measured += judged(recipe.evaluate, measured)
            clock.lap("evaluate compressed")
        report = _report(request, prepared, data, rows).with_measurements([*measured, *clock.stages()])
        told = (*report.warnings, *loss_warnings(measured), *corpus_warnings(measured))
        report = report.model_copy(update={"warnings": told})
        result = _result(request, prepared, model, report)
        result = replace(result, report=processes.broadcast(_saved(request, result) if processes.is_first else report))
        if run is not None:
            run.discard()
    published = publish_run(request.output, recipe, result.report) if processes.is_first and request.output else ()
    offloaded = prepared.loaded.weights is not None
    return CompressedModel(result, request.device, request.output, offloaded=offloaded, published=published)


def _opened_run(request: CompressionRequest, prepared: Prepared) -> AbstractContextManager[Run | None]:
    """The run folder, in the first process alone, and only beside an output."""
    if request.output is None or not request.processes.is_first:
        return nullcontext()
    recipe, model = request.recipe, prepared.loaded.name
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
        held_out_NT=data.held_out_NT if data and request.recipe.guard.fall_back else None,
        device=request.device,
        storage_dtype=prepared.storage_dtype,
        seed=request.recipe.seed,
        weights_at=prepared.weights_at,
        **request.recipe.calibration.of_blocks(request.device),
        processes=request.processes,
        keep=run if request.output is None else shared(run, request.processes),
        progress=request.progress,
        teachers=teachers_of(request),
        examples=examples_of(request, prepared, run.data_folder if run else None),
    )


def _dense(request: CompressionRequest, prepared: Prepared) -> list[Observed]:
    """What the metrics see of the model before anything is done to it."""
    # offloaded weights compute in float32, whatever the files hold
    about = {**numeric_versions(), "runner": "torch", "dtype": "float32", "device": request.device.type}
    found = observe(
        prepared.metrics,
        lambda: TorchRunner(prepared.loaded.model, weights_at=prepared.weights_at, device=request.device),
        model={**prepared.identity, **about},
        cache=score_cache(),
        progress=request.progress,
    )
    return list(found)


def _compared(
    request: CompressionRequest, prepared: Prepared, model: PreTrainedModel, dense: Sequence[Observed]
) -> list[Measurement]:
    """What they see of the compressed model, and how it differs."""
    gate = gate_of(request.recipe.evaluate)
    found = list(
        observe(
            prepared.metrics,
            lambda: TorchRunner(model, weights_at=prepared.weights_at, device=request.device),
            model=None,
            cache=score_cache(),
            progress=request.progress,
            dense=dense,
            keep_not_finite=gate is not None and bool(gate.finite),
        )
    )
    return [*results(found, "compressed"), *comparisons(dense, found)]


def _report(
    request: CompressionRequest, prepared: Prepared, data: CalibrationData | None, rows: Sequence[SiteReport]
) -> Report:
    loaded, texts = prepared.loaded, [text for metric in prepared.metrics for text in metric.texts]
    about_data = (
        [*data.warnings, *overlap_warnings(data, texts), *coverage_warnings(rows, prepared.map)] if data else []
    )
    about_texts = text_warnings(prepared.metrics)
    about_model = [*loaded.preflight.warnings, *prepared.notes]
    dense_bytes = bytes_on_disk(loaded.folder) if loaded.folder else loaded.preflight.bytes_weights
    return Report(
        model=loaded.name,
        base={**({"commit": loaded.commit} if loaded.commit else {}), **prepared.identity},
        recipe_hash=request.recipe.hash(),
        versions=versions(),
        machine=machine(),
        calibration_tokens=data.tokens if data else 0,
        sites=tuple(rows),
        refused=refused(prepared.map, rounded={row.site for row in rows}),
        measurements=(WeightBytes(of="dense", bytes=dense_bytes),),
        warnings=tuple(dict.fromkeys([*about_model, *about_data, *about_texts, *degraded_warnings(rows)])),
    )


def _result(request: CompressionRequest, prepared: Prepared, model: PreTrainedModel, report: Report) -> Result:
    loaded = prepared.loaded
    return Result(
        model=model,
        tokenizer=loaded.tokenizer,
        recipe=request.recipe,
        report=report,
        storage_dtype=prepared.storage_dtype,
        generation_config=loaded.preflight.generation_config,
        source_folder=loaded.folder,
        weights_at=prepared.weights_at,
    )


def _saved(request: CompressionRequest, result: Result) -> Report:
    """Written to the output, or counted how much that would be: the report with the bytes."""
    if request.output is None:
        return result.measured(bytes_to_write(result))
    return save_run(result, request.output, overwrite=request.overwrite, progress=request.progress)


def plan(
    model: ModelLike | None,
    recipe: RecipeLike,
    *,
    offload: Offload = "auto",
    machine: Machine | None = None,
    probe_on: torch.device | None = None,
    progress: ProgressLike = None,
) -> Plan:
    """What `compress` would do: sites, bytes, memory, and on `machine` time. Reads config and headers, no weights.

    `probe_on`: compress a few blocks of each kind on this device, unsaved, to estimate the time from that.

    Raises: CompressError for what `compress` would refuse.
    """
    live = in_memory(model)
    name = None if model is None else f"{IN_MEMORY}{type(live).__name__}" if live is not None else str(model)
    chosen = within_target_limits(as_recipe(recipe).for_model(name))
    if live is not None:
        return make_plan(known_in_memory(live), chosen, offload="never", machine=machine)
    source = find_source(str(chosen.model), revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    known = known_model(source, trust_remote_code=chosen.trust_remote_code)
    planned = make_plan(known, chosen, offload=offload, machine=machine)
    if probe_on is None:
        return planned
    return with_trial(planned, chosen, Bench(source, known, probe_on, progress=as_progress(progress)))


def inspect(model: ModelLike) -> dict[str, Any]:
    """The model map: blocks, sites, shared inputs, folds, width groups, and what cannot be compressed and why.

    Of a saved compressed model: what each site is; no weight is read.

    Raises: CompressError when there is no such model, or its structure or format is not understood.
    """
    live = in_memory(model)
    if live is not None:
        return describe(probe(live.config, unfuse=True) if is_dense(live) else map_model(live))
    return inspect_folder(find_source(str(model)).folder)


def speed(
    models: ModelLike | Sequence[ModelLike],
    *,
    device: str = "auto",
    dtype: str = "auto",
    runner: str | Sequence[str] = "torch",
    batch: int | Sequence[int] = 1,
    context: int | Sequence[int] = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    skip: Collection[Skipped] = (),
) -> CostTable:
    """What dense or compressed models cost on this device: tokens per second, memory, bytes read, energy, in turns.

    `dtype` auto: float32 on a CPU. One `runner` for all, or one for each. Models in memory are measured where and as
    they are.

    Raises: CompressError when a model cannot be read.
    """
    settings = CostSettings(
        batches=several(batch),
        contexts=several(context),
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
        skip=skip,
    )
    candidates = as_candidates(named_models(models), [runner] if isinstance(runner, str) else runner)
    return measure_costs(candidates, device=usable_device(device), dtype=dtype, settings=settings)


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
            progress=request.progress,
            given=loaded.model if request.given is None else request.given,
            held_out=recipe.guard.windows,
        )
    rows = loaded.preflight.contents.embedding_rows
    refuse_beyond_embedding(data.windows_NT, loaded.tokenizer, rows, where=f"calibration: {data.source}")
    return data
