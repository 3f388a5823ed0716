"""Decide a recipe's mixed precision and write the decision out as a recipe with ordinary `overrides`."""

from __future__ import annotations

from pathlib import Path

import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.devices import usable_device
from llmcompress.calibration.tokens import max_positions
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.export.loader import loader_of
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.quantization.mixed_precision import MixedPrecision
from llmcompress.planning import aimed_at_target, check_recipe, storage_dtype_of
from llmcompress.presets import as_recipe
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import Recipe


def allocate(
    model: str | None, recipe: Recipe | str | Path, *, device: str = "auto", progress: Progress | None = None
) -> Recipe:
    """The recipe with its `mixed_precision` replaced by the quantizer inside and the overrides that were decided.

    It makes the same result, without deciding again. Passes before the decision are applied in memory; nothing is
    saved. Raises: CompressError when the recipe has not exactly one such pass, and for all that `compress` refuses.
    """
    progress = progress or Silent()
    chosen = aimed_at_target(as_recipe(recipe).for_model(model))
    (index,) = _places(chosen)
    deciding = chosen.passes[index]
    assert isinstance(deciding, MixedPrecision)
    progress.stage("load", 1)
    source = find_source(str(chosen.model), revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    loaded = load_for_compression(source, trust_remote_code=chosen.trust_remote_code, progress=progress)
    live, model_map = loaded.model, map_model(loaded.model)
    check_recipe(chosen, model_map, loader_of(live.config))
    torch.manual_seed(chosen.seed)
    data = calibration_windows(
        chosen.calibration,
        loaded.tokenizer,
        max_positions=max_positions(live.config),
        seed=chosen.seed,
        model=live,
        progress=progress,
    )
    where = usable_device(device)
    context = RunContext(
        data.windows_NT,
        batch=chosen.calibration.batch,
        device=where,
        storage_dtype=storage_dtype_of(chosen, loaded.preflight),
        seed=chosen.seed,
        experts=chosen.calibration.experts,
        progress=progress,
    )
    if index:
        live, _ = apply_passes(live, model_map, chosen.passes[:index], context)
        model_map = map_model(live)
    progress.stage("decide", 1)
    whole = WholeModel(live, model_map, context)
    settled = deciding.settled(deciding.decide(whole))
    progress.step("decided")
    return chosen.model_copy(update={"passes": (*chosen.passes[:index], settled, *chosen.passes[index + 1 :])})


def _places(recipe: Recipe) -> list[int]:
    found = [index for index, each in enumerate(recipe.passes) if isinstance(each, MixedPrecision)]
    if len(found) != 1:
        raise CompressError(
            "recipe.nothing-to-allocate",
            f"the recipe has {len(found)} passes `mixed_precision`, one is decided at a time",
            fix="write one, e.g. `- mixed_precision: {bits: 3.5, quantizer: {gptq: {}}}`",
            exit_code=ExitCode.USAGE,
        )
    return found
