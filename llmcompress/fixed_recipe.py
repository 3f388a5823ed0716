"""Makes all allocation decisions of a recipe and writes them out as a recipe of ordinary options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.devices import usable_device
from llmcompress.calibration.in_memory import as_calibration
from llmcompress.calibration.tokens import max_positions, refuse_beyond_embedding
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.loader import loader_of
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes, stages
from llmcompress.passes.base import Pass
from llmcompress.planning import check_recipe, check_texts, storage_dtype_of, within_target_limits
from llmcompress.presets import RecipeLike, as_recipe
from llmcompress.progress import ProgressLike, as_progress
from llmcompress.recipe import Recipe


def allocate(
    model: str | Path | None,
    recipe: RecipeLike,
    *,
    calibration: Any = None,
    device: str = "auto",
    progress: ProgressLike = None,
) -> Recipe:
    """The recipe with everything decided that its passes decide by data: schemes, ranks, sparsities, units, blocks.

    It makes the same result without deciding again. Passes before a decision are applied in memory; nothing is saved.
    The model is read from files; `recipe`, `calibration` and `progress` are as for `compress`.

    Raises: CompressError when no pass decides anything that a recipe can say, and for all that `compress` refuses.
    """
    progress = as_progress(progress)
    chosen = as_recipe(recipe).for_model(None if model is None else str(model))
    settings, given = as_calibration(calibration, chosen.calibration, held_out=chosen.guard.windows)
    chosen = within_target_limits(chosen.model_copy(update={"calibration": settings}))
    check_texts(chosen, given=given is not None)
    progress.stage("load", 1)
    source = find_source(str(chosen.model), revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    loaded = load_for_compression(source, trust_remote_code=chosen.trust_remote_code, progress=progress)
    unfuse_experts(loaded.model, loaded.weights)
    model_map = map_model(loaded.model)
    check_recipe(chosen, model_map, loader_of(loaded.model.config))
    torch.manual_seed(chosen.seed)
    windows_NT = torch.zeros(0, 1, dtype=torch.long)
    if any(each.uses_data() for each in chosen.passes):
        data = calibration_windows(
            chosen.calibration,
            loaded.tokenizer,
            max_positions=max_positions(loaded.model.config),
            seed=chosen.seed,
            progress=progress,
            given=loaded.model if given is None else given,
        )
        windows_NT = data.windows_NT
        rows = loaded.preflight.contents.embedding_rows
        refuse_beyond_embedding(windows_NT, loaded.tokenizer, rows, where=f"calibration: {data.source}")
    where = usable_device(device)
    context = RunContext(
        windows_NT,
        device=where,
        storage_dtype=storage_dtype_of(chosen.save, loaded.preflight),
        seed=chosen.seed,
        **chosen.calibration.of_blocks(where),
        progress=progress,
    )
    passes = decided_passes(WholeModel(loaded.model, model_map, context), chosen.passes)
    return chosen.model_copy(update={"passes": passes})


def decided_passes(whole: WholeModel, passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes with all decisions taken, each on the model as those before it leave it. The model is changed.

    Raises: CompressError when nothing was decided that options can say.
    """
    settled: list[Pass] = []
    waiting: list[Pass] = []
    for index, each in enumerate(passes):
        found = each
        if each.decides:
            whole = _applied(whole, waiting)
            waiting = []
            whole.context.progress.stage(f"decide pass {index + 1}", 1)
            each.check(whole.map)
            decisions = each.decide(whole.within(whole.context.at(f"{index:02d}")))
            found = (each.with_decisions(decisions) if decisions else None) or each
            whole.context.progress.step("decided")
        settled.append(found)
        waiting.append(found)
    if tuple(settled) == tuple(passes):
        raise CompressError(
            "recipe.nothing-to-allocate",
            "no pass of the recipe makes a decision that can be written into a recipe",
            fix="add a pass that allocates, e.g. `- mixed_precision: {bits: 3.5, quantizer: {gptq: {}}}`",
            exit_code=ExitCode.USAGE,
        )
    return tuple(settled)


def _applied(whole: WholeModel, passes: Sequence[Pass]) -> WholeModel:
    if not passes:
        return whole
    model, _ = apply_passes(whole.model, whole.map, passes, whole.context)
    changed = any(stage.changes_sites for stage in stages(passes))
    return WholeModel(model, map_model(model) if changed else whole.map, whole.context)
