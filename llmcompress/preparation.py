"""From an order to a model that is read, mapped, checked against the recipe and known by its hashes: no work yet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmcompress.calibration.offloading import InMemory, OnDisk, WeightStore
from llmcompress.calibration.process_group import ProcessGroup
from llmcompress.calibration.tokens import max_positions, refuse_beyond_embedding
from llmcompress.cost import Offload, must_offload
from llmcompress.evaluation.texts import EvaluationText, evaluation_text
from llmcompress.exporters.loader import loader_of
from llmcompress.loading.load import Loaded, load_for_compression
from llmcompress.loading.preflight import preflight
from llmcompress.loading.source import Source, find_source
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.planning import check_recipe, check_texts, storage_dtype_of
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.storage.disk import sha256
from llmcompress.storage.folder import check_output, run_folder
from llmcompress.storage.ownership import begin_run_folder, remove_unused_run_folder
from llmcompress.storage.paths import from_home


@dataclass(frozen=True, kw_only=True)
class CompressionRequest:
    """What was asked for, and how it is to be run."""

    recipe: Recipe
    output: Path
    device: torch.device
    processes: ProcessGroup
    overwrite: bool
    fresh: bool
    offload: Offload
    progress: Progress


@dataclass(frozen=True)
class Prepared:
    """A model that was read, mapped and found to fit the recipe; nothing was changed yet."""

    loaded: Loaded
    weights_at: WeightStore
    map: ModelMap
    notes: tuple[str, ...]
    texts: tuple[EvaluationText, ...]
    storage_dtype: torch.dtype
    identity: Mapping[str, str]
    """Hashes of the files that decide what the model computes; empty where only the first process needs them."""


def prepare(request: CompressionRequest) -> Prepared:
    """Everything that can be refused is refused here, and then no run folder is left that this order made.

    Raises: CompressError for an output that cannot be written, and any fault of the model, the recipe or a text.
    """
    try:
        return _prepared(request)
    except BaseException:
        if request.processes.is_first:
            remove_unused_run_folder(run_folder(request.output))
        raise


def _prepared(request: CompressionRequest) -> Prepared:
    recipe, output, processes = request.recipe, request.output, request.processes
    if processes.is_first:
        check_output(output, overwrite=request.overwrite, source=from_home(str(recipe.model)))
    request.progress.stage("load", 1)
    check_texts(recipe)
    source = find_source(str(recipe.model), revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    checked = preflight(source, trust_remote_code=recipe.trust_remote_code, progress=request.progress)
    weight_bytes = checked.bytes_weights
    # a finished folder is no larger than the model; better refused now than when it is written
    if processes.is_first:
        check_output(output, overwrite=request.overwrite, needed_bytes=weight_bytes, source=source.folder)
    on_disk = must_offload(request.offload, recipe.passes, weight_bytes=weight_bytes, processes=processes.count)
    if on_disk:
        begin_run_folder(run_folder(output))
    loaded = load_for_compression(
        source,
        trust_remote_code=recipe.trust_remote_code,
        scratch=run_folder(output) / "converted" if on_disk else None,
        checked=checked,
    )
    unfuse_experts(loaded.model, loaded.weights)
    model_map = map_model(loaded.model)
    storage_dtype = storage_dtype_of(recipe, loaded.preflight)
    notes = check_recipe(recipe, model_map, loader_of(loaded.model.config), storage_dtype).notes
    limit = max_positions(loaded.model.config)
    texts = tuple(evaluation_text(task, loaded.tokenizer, limit) for task in recipe.evaluate)
    for text in texts:
        refuse_beyond_embedding(text.windows, loaded.tokenizer, checked.contents.embedding_rows, where=text.name)
    return Prepared(
        loaded,
        InMemory() if loaded.weights is None else OnDisk(loaded.weights),
        model_map,
        tuple(notes),
        texts,
        storage_dtype,
        _identity(source) if processes.is_first else {},
    )


def _identity(source: Source) -> dict[str, str]:
    """Hashes of the weights, and of the config with the code that comes with it."""
    weights, config = hashlib.sha256(), hashlib.sha256()
    for path in sorted(source.folder.glob("*.safetensors")):
        weights.update(bytes.fromhex(sha256(path)))
    for path in [source.folder / "config.json", *sorted(source.folder.rglob("*.py"))]:
        config.update(path.read_bytes())
    return {"weights": weights.hexdigest(), "config": config.hexdigest()}
