"""The main loop of a run: stage by stage, block by block, pass by pass; finished work is saved for resuming.

A stage is a chain of block passes that share one stream over the blocks, or one pass on the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.infer_config import with_inferred_config
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.base import PASSES, BlockPass, ModelPass, Pass
from llmcompress.passes.guard import Guard
from llmcompress.records.rows import SiteReport


@dataclass(frozen=True)
class Stage:
    """Passes that share one stream over the blocks; or one `ModelPass` alone."""

    index: int
    passes: tuple[Pass, ...]

    @property
    def model_pass(self) -> ModelPass | None:
        """The pass on the whole model, if this is one."""
        return self.passes[0] if isinstance(self.passes[0], ModelPass) else None

    @property
    def block_passes(self) -> tuple[BlockPass, ...]:
        """The passes on blocks."""
        return tuple(each for each in self.passes if isinstance(each, BlockPass))

    @property
    def changes_sites(self) -> bool:
        """Whether the model needs another map afterwards."""
        return self.model_pass is not None or any(each.changes_sites for each in self.block_passes)


def stages(passes: Sequence[Pass]) -> list[Stage]:
    """Cut before a pass that must see the whole model first, and after one that changes what the linears are."""
    cut: list[list[Pass]] = []
    closed = True
    for each in passes:
        alone = isinstance(each, ModelPass)
        if closed or alone or each.decides or (isinstance(each, BlockPass) and each.new_stage):
            cut.append([])
        cut[-1].append(each)
        closed = alone or (isinstance(each, BlockPass) and each.changes_sites)
    return [Stage(index, tuple(members)) for index, members in enumerate(cut)]


class Compressed(NamedTuple):
    """The result; its model may be another object than the input."""

    model: PreTrainedModel
    rows: list[SiteReport]


def apply_passes(
    model: PreTrainedModel,
    model_map: ModelMap,
    passes: Sequence[Pass],
    context: RunContext,
) -> Compressed:
    """Apply the passes in order; the given model is changed in place where that is possible.

    Where the context has a `keep`, finished work is restored instead of computed, and all new work is kept. Without
    windows (0×T) nothing is measured and nothing is fed onward. Weights are on disk only with `keep`.
    """
    rows: list[SiteReport] = []
    keep = context.keep
    done = keep.finished_model() if keep else None
    if keep and done is not None:
        model, rows = keep.restore_model(done, model)
        model_map = map_model(model)
    whole = WholeModel(model, model_map, context)
    cut = stages(passes)
    todo = [stage for stage in cut if done is None or stage.index > done]
    for each in [each for stage in todo for each in stage.passes]:
        if not each.streams():
            whole.context.weights_at.require_memory(f"`{PASSES.name_of(type(each))}`")
        if not each.pools():
            context.processes.require_one(f"`{PASSES.name_of(type(each))}`")
    for stage in todo:
        # what a checkpoint brings along is another thing than what this recipe did
        known = [trait for each in cut[: stage.index + 1] for one in each.passes for trait in one.traits()]
        pruned = not {"zeros", "pattern"}.isdisjoint(known)
        whole.context = replace(context, stage=stage.index, zeros_are_masks=pruned)
        for each in stage.passes:
            each.check(whole.map)
        if stage.model_pass:
            whole.decisions = _decisions(whole, stage) if stage.model_pass.decides else None
            rows += stage.model_pass.apply(whole)
            _settle(whole.model, context.storage_dtype)
        else:
            rows += _stream(whole, stage, label=f"stage {stage.index + 1}/{len(cut)}, " if len(cut) > 1 else "")
        if stage.changes_sites:
            whole.model = with_inferred_config(whole.model)
        if keep and stage.model_pass:
            keep.save_model(stage.index, whole.model, rows)
        if stage.changes_sites and stage is not todo[-1]:
            whole.map = map_model(whole.model)
        if stage.model_pass:
            context.progress.step(f"stage {stage.index + 1}/{len(cut)}")
    return Compressed(whole.model, rows)


def steps(passes: Sequence[Pass], model_map: ModelMap) -> int:
    """How many steps `apply_passes` reports as progress."""
    return sum(1 if stage.model_pass else len(model_map.blocks) for stage in stages(passes))


def _stream(whole: WholeModel, stage: Stage, *, label: str) -> list[SiteReport]:
    """One stream over the blocks with all passes of the stage."""
    rows: list[SiteReport] = []
    keep = whole.context.keep
    decisions = _decisions(whole, stage)
    finished = set(keep.finished_blocks(stage.index)) if keep else set()
    count = len(whole.map.blocks)
    guard = Guard.of(whole, stage.block_passes, decisions)
    for work in whole.stream(dense=any(each.wants_dense() for each in stage.block_passes)):
        index = work.info.index
        if guard:
            guard.begin(work)
        if keep and index in finished:
            block_rows = keep.restore_block(stage.index, index, work.module)
            if guard:
                guard.restored(work)
        else:
            before = meta_copy(work.module)
            work.decisions = decisions
            plain = guard.baseline(work) if guard else None
            block_rows = [row for each in stage.block_passes for row in each.run(work)]
            work.round_to_storage_dtype()
            if guard and plain:
                block_rows = guard.judge(work, block_rows, plain)
            whole.context.processes.broadcast_tensors(work.module)
            if keep:
                keep.save_block(stage.index, index, work.module, before, block_rows)
        if keep:
            whole.context.weights_at.moved(work.info.name, partial(keep.block_state, stage.index, index))
        rows += block_rows
        whole.context.progress.step(f"{label}block {index + 1}/{count}")
    return rows


def _decisions(whole: WholeModel, stage: Stage) -> dict[str, Tensor]:
    """Only the first pass of a stage can decide; its decisions are saved."""
    first, keep = stage.passes[0], whole.context.keep
    if not first.decides:
        return {}
    known = keep.decisions(stage.index) if keep else None
    if known is None:
        known = first.decide(whole.within(whole.context.at(f"{stage.index:02d}")))
        if keep:
            keep.save_decisions(stage.index, known)
    return known


@torch.no_grad()
def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of a module's structure whose tensors are all on the meta device."""
    tensors: Iterator[Tensor] = (t for owner in (module.parameters(), module.buffers()) for t in owner)
    memo: dict[int, object] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _settle(model: nn.Module, storage_dtype: torch.dtype) -> None:
    """Round every parameter to the stored dtype, as the stream does block by block."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(storage_dtype))
