"""From a request to a loaded and mapped model that is checked against the recipe and hashed, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llmcompress.calibration.context import ExampleRows
from llmcompress.calibration.in_memory import GivenData
from llmcompress.calibration.offloading import InMemory, OnDisk, WeightStore
from llmcompress.calibration.process_group import ProcessGroup
from llmcompress.calibration.tokens import max_positions
from llmcompress.cost import Offload, about, cost, this_machine
from llmcompress.elicitation.authors import Author, Authors
from llmcompress.elicitation.base import Row
from llmcompress.elicitation.chain import make_rows
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.gate import check_gate
from llmcompress.evaluation.measuring import prepared
from llmcompress.evaluation.metrics.base import Metric, Subject
from llmcompress.evaluation.settings.cost import refuse_cost
from llmcompress.exporters.base import EXPORTERS
from llmcompress.exporters.loader import loader_of
from llmcompress.exporting import export_folders
from llmcompress.known_model import size_of
from llmcompress.loading.identity import identity_of_folder
from llmcompress.loading.in_memory import LiveModel, identity_in_memory
from llmcompress.loading.load import Loaded, load_for_compression
from llmcompress.loading.preflight import preflight
from llmcompress.loading.source import find_source
from llmcompress.loading.teachers import ORIGINAL, TeacherFiles
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.base import PASSES
from llmcompress.planning import (
    check_recipe,
    check_stream,
    check_texts,
    fitted_to_model,
    storage_dtype_of,
    with_weights_placed,
)
from llmcompress.progress import Progress
from llmcompress.publishing.destinations import check_destinations
from llmcompress.publishing.rights import check_all_rights
from llmcompress.recipe import Recipe
from llmcompress.storage.folder import check_output, run_folder
from llmcompress.storage.ownership import begin_run_folder, remove_unused_run_folder
from llmcompress.storage.paths import from_home


@dataclass(frozen=True, kw_only=True)
class CompressionRequest:
    """What was asked for, and how it is to be run."""

    recipe: Recipe
    output: Path | None
    """None: the result stays in memory, and nothing is written."""
    live: LiveModel | None
    """A model that is in memory already, in float32 on the CPU; None: the recipe names it."""
    given: GivenData | None
    """Calibration data that are in memory already; None: the recipe says where they come from."""
    device: torch.device
    processes: ProcessGroup
    overwrite: bool
    fresh: bool
    offload: Offload
    progress: Progress


@dataclass(frozen=True)
class Prepared:
    """A model that was read, mapped and found to fit the recipe; nothing was changed yet."""

    recipe: Recipe
    """As it fits this model: every scheme is one that its sites can have."""
    loaded: Loaded
    weights_at: WeightStore
    map: ModelMap
    notes: tuple[str, ...]
    metrics: tuple[Metric, ...]
    """What the dense and the compressed model are evaluated on, read and checked."""
    storage_dtype: torch.dtype
    identity: Mapping[str, str]
    """Hashes of what decides what the model computes; empty where nothing is kept under them."""


def prepare(request: CompressionRequest) -> Prepared:
    """Everything that can be refused is refused here, and then no run folder is left that this request made.

    Raises: CompressError for an output that cannot be written, and any fault of the model, the recipe or a text.
    """
    try:
        return _prepared(request)
    except BaseException:
        if request.processes.is_first and request.output is not None:
            remove_unused_run_folder(run_folder(request.output))
        raise


def estimate(prepared: Prepared, device: torch.device) -> str:
    """How long the run will take on `device`: a measured speed, and the recipe's operations."""
    offloaded = not isinstance(prepared.weights_at, InMemory)
    taken = cost(prepared.recipe, prepared.map, size_of(prepared.loaded.preflight), offloaded=offloaded)
    machine = this_machine(device)
    evaluating = taken.evaluation_operations
    ending = f", and {about(evaluating / machine.operations_per_second)} to evaluate" if evaluating else ""
    return f"estimate for this machine: about {about(machine.seconds(taken))} to compress{ending}"


def _prepared(request: CompressionRequest) -> Prepared:
    recipe, processes = request.recipe, request.processes
    targets = [EXPORTERS.name_of(type(each)) for each in recipe.export]
    check_destinations(recipe.publish, exported=targets, has_output=request.output is not None)
    if processes.is_first and request.output is not None:
        named = None if request.live else from_home(str(recipe.model))
        for folder in (request.output, *export_folders(request.output, recipe.export).values()):
            check_output(folder, overwrite=request.overwrite, source=named)
        check_all_rights(recipe.publish)
    request.progress.stage("load", 1)
    check_texts(recipe, given=request.given is not None)
    check_gate(recipe.evaluate, compares=True)
    refuse_cost(recipe.evaluate)
    recipe, loaded = _loaded(request) if request.live is None else (recipe, _in_memory(request, request.live))
    unfuse_experts(loaded.model, loaded.weights)
    model_map = map_model(loaded.model)
    storage_dtype = storage_dtype_of(recipe.save, loaded.preflight)
    notes = check_recipe(recipe, model_map, loader_of(loaded.model.config), storage_dtype).notes
    check_stream(recipe, loaded.model.config)
    limit = max_positions(loaded.model.config)
    subject = Subject(loaded.tokenizer, limit, loaded.preflight.contents.embedding_rows)
    metrics = prepared(recipe.evaluate, subject)
    return Prepared(
        fitted_to_model(recipe, model_map),
        loaded,
        InMemory() if loaded.weights is None else OnDisk(loaded.weights),
        model_map,
        tuple(notes),
        metrics,
        storage_dtype,
        _identity(loaded) if processes.is_first and (recipe.evaluate or request.output) else {},
    )


def _loaded(request: CompressionRequest) -> tuple[Recipe, Loaded]:
    """The model that the recipe names, read from its files; and the recipe, without optional passes if offloaded."""
    recipe, output, processes = request.recipe, request.output, request.processes
    source = find_source(str(recipe.model), revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    checked = preflight(source, trust_remote_code=recipe.trust_remote_code, progress=request.progress)
    check_teachers(recipe, teachers_of(request), checked.tokenizer)
    check_data(recipe, teachers_of(request), checked.tokenizer)
    weight_bytes = checked.bytes_weights
    # a finished folder is no larger than the model; better refused now than when it is written
    if processes.is_first and output is not None:
        check_output(output, overwrite=request.overwrite, needed_bytes=weight_bytes, source=source.folder)
    scratch = None
    recipe, offloaded = with_weights_placed(
        recipe, request.offload, weight_bytes=weight_bytes, processes=processes.count
    )
    if offloaded:
        if output is None:
            raise _needs_memory("weights on disk need a run folder, which stands beside the output", "name an `output`")
        begin_run_folder(run_folder(output))
        scratch = run_folder(output) / "converted"
    return recipe, load_for_compression(
        source, trust_remote_code=recipe.trust_remote_code, scratch=scratch, checked=checked
    )


def _in_memory(request: CompressionRequest, live: LiveModel) -> Loaded:
    """The model that was handed over, checked."""
    if request.offload == "always":
        raise _needs_memory(
            "the model is in memory already", "set offload to never, or name the folder or id of the model"
        )
    check_teachers(request.recipe, teachers_of(request), live.tokenizer)
    check_data(request.recipe, teachers_of(request), live.tokenizer)
    for warning in live.facts.warnings:
        request.progress.note(warning)
    if request.processes.is_first and request.output is not None:
        check_output(request.output, overwrite=request.overwrite, needed_bytes=live.facts.bytes_weights)
    return Loaded(live.model, live.tokenizer, live.name, None, live.facts)


def teachers_of(request: CompressionRequest) -> TeacherFiles:
    """Where passes find the models they learn from; `original` is in files unless it was handed over in memory."""
    recipe = request.recipe
    name = None if request.live is not None else recipe.model
    return TeacherFiles(
        name,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        tokenizer=None if request.live is None else request.live.tokenizer,
    )


def check_teachers(recipe: Recipe, teachers: TeacherFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every teacher is there and has the student's vocabulary, unless a pass maps it.

    Raises: CompressError otherwise.
    """
    asked = [(name, each.maps_vocabulary()) for each in recipe.passes for name in each.teachers()]
    for name, mapped in dict.fromkeys(asked):
        teachers.check(name, tokenizer, mapped=mapped)


def check_data(recipe: Recipe, teachers: TeacherFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    """The `data` steps have the files and models that they ask for, and some pass learns from what they make.

    Raises: CompressError otherwise.
    """
    for step in recipe.data:
        step.check()
        for name in step.asks():
            if name != ORIGINAL:
                teachers.check(name, tokenizer, mapped=True)
    needing = next((each for each in recipe.passes if each.needs_examples), None)
    if needing and not recipe.data:
        raise CompressError(
            "data.none",
            f"`{PASSES.name_of(type(needing))}` learns from examples, and the recipe makes none",
            where="data",
            fix="add `data:` with steps such as `read` and `rank`",
            exit_code=ExitCode.USAGE,
        )
    if recipe.data and not any(each.learns_from_examples for each in recipe.passes):
        raise CompressError(
            "data.unused",
            "the recipe makes training examples, and no pass learns from them",
            where="data",
            fix="add `recover`, `distill` or `preference`, or remove `data`",
            exit_code=ExitCode.USAGE,
        )


def examples_of(request: CompressionRequest, prepared: Prepared, folder: Path | None) -> ExampleRows | None:
    """The rows that the steps of `data` make, by the model as it is now and others; `folder` keeps finished units.

    Raises: CompressError when no row is left, or a step misses something.
    """
    recipe, loaded, teachers = request.recipe, prepared.loaded, teachers_of(request)
    if not recipe.data:
        return None

    def read(name: str) -> Author:
        if name == ORIGINAL:
            return Author(loaded.model.eval(), loaded.tokenizer, request.device)
        return Author(teachers.model(name).to(request.device).eval(), teachers.tokenizer(name), request.device)

    made: list[Row] = []
    if request.processes.is_first:
        request.progress.stage("data", len(recipe.data))
        with prepared.weights_at.running(loaded.model, request.device):
            made = make_rows(recipe.data, Authors(read), seed=recipe.seed, folder=folder, progress=request.progress)
    settings = recipe.calibration
    rows = request.processes.broadcast(made)
    return ExampleRows(rows, loaded.tokenizer, settings.tokens, settings.chat_template)


def _needs_memory(what: str, fix: str) -> CompressError:
    return CompressError("memory.needed", what, fix=fix, exit_code=ExitCode.USAGE)


def _identity(loaded: Loaded) -> dict[str, str]:
    """Hashes of the weights, and of the config with the code that comes with it."""
    return identity_in_memory(loaded.model) if loaded.folder is None else identity_of_folder(loaded.folder)
