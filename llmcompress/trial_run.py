"""The recipe for real on a few blocks of the model, to estimate how long it takes on all of them.

A run is timed part by part, as it saves its parts. In a stage that goes block by block the first block also pays for
what comes before it, and its outputs are fed onward in the time of the second; so the time between two blocks is what
one more block of that kind takes, and all blocks but the first are counted so. What takes the whole model at once
(decisions, passes on the whole model) is measured at two depths: a part per operation (`cost.py`), and a fixed part.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.token_windows import CalibrationData
from llmcompress.cost import Cost, cost, this_machine
from llmcompress.errors import CompressError
from llmcompress.known_model import KnownModel, size_of
from llmcompress.loading.mapped import map_weights
from llmcompress.loading.preflight import Preflight
from llmcompress.loading.source import Source
from llmcompress.model.depth import drop_blocks
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, BlockPass, ModelPass, Pass
from llmcompress.passes.globs import matches
from llmcompress.planning import Plan, fitted_to_model, storage_dtype_of
from llmcompress.progress import Progress, Silent
from llmcompress.recipe.model import Recipe
from llmcompress.records.rows import SiteReport
from llmcompress.run import Run

_STREAMED, _WITH_WHOLE, _WITH_HEAD = (2,), (1, 2), (2, 6)
"""How many blocks of each kind the runs have: where all goes block by block; where something takes the whole model;
where that computes logits, which take longer than a block."""


@dataclass(frozen=True)
class Trial:
    """What was found."""

    seconds: float
    """That the recipe is going to take on all blocks."""
    blocks: tuple[int, ...]
    """Those of the largest run."""
    left_out: tuple[str, ...]
    """Passes that train the whole model."""

    def applied_to(self, plan: Plan) -> Plan:
        """The plan with the seconds that the whole recipe is going to take."""
        note = f"{', '.join(self.left_out)}: not part of the trial, estimated from operations" if self.left_out else ""
        warnings = (*plan.warnings, note) if note else plan.warnings
        found = {"estimated_seconds": self.seconds, "probed_blocks": self.blocks, "warnings": warnings}
        return plan.model_copy(update=found)


def with_trial(plan: Plan, recipe: Recipe, bench: Bench) -> Plan:
    """The plan with the seconds that a trial estimates; as it was, with the reason, where few blocks do not do.

    Raises: CompressError as the calibration text does.
    """
    data = bench.windows(recipe)
    try:
        return bench.trial(recipe, data).applied_to(plan)
    except CompressError as problem:
        return plan.model_copy(
            update={"warnings": (*plan.warnings, f"time is estimated from operations: {problem.what}")}
        )


@dataclass(frozen=True)
class _Part:
    """A piece of a run, from the end of the piece before."""

    stage: int
    block: int | None
    """Its place in the run; None: a decision about the whole model, or a pass on it."""
    seconds: float


@dataclass(frozen=True)
class _Measured:
    """One run on a few blocks."""

    parts: tuple[_Part, ...]
    blocks: tuple[int, ...]
    """Their places in the whole model."""
    taken: Cost

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(part.seconds for part in self.parts)

    @property
    def whole_model_seconds(self) -> float:
        """Of what takes the whole model at once."""
        return sum(part.seconds for part in self.parts if part.block is None)

    @property
    def first_block_seconds(self) -> float:
        """Of the first block in every stage, with what comes before it."""
        return sum(part.seconds for part in self.parts if part.block == 0)


class _TimedRun(Run):
    """A run folder that notes when every part of the run was saved."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.saved_parts: list[tuple[int, int | None, float]] = []
        self.clock: Callable[[], float] = time.perf_counter

    @override
    def save_block(self, stage: int, index: int, block: nn.Module, before: nn.Module, rows: list[SiteReport]) -> None:
        super().save_block(stage, index, block, before, rows)
        self.saved_parts.append((stage, index, self.clock()))

    @override
    def save_decisions(self, stage: int, decisions: Mapping[str, Tensor]) -> None:
        super().save_decisions(stage, decisions)
        self.saved_parts.append((stage, None, self.clock()))

    @override
    def save_model(self, stage: int, model: PreTrainedModel, rows: list[SiteReport]) -> None:
        super().save_model(stage, model, rows)
        self.saved_parts.append((stage, None, self.clock()))

    def parts(self, started: float) -> tuple[_Part, ...]:
        """Everything that was saved, each with the seconds since what was saved before it."""
        began = [started, *(ended for _, _, ended in self.saved_parts)]
        pairs = zip(self.saved_parts, began, strict=False)
        return tuple(_Part(stage, block, ended - start) for (stage, block, ended), start in pairs)


@dataclass(frozen=True)
class Bench:
    """Where trials take place."""

    source: Source
    known: KnownModel
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    """Of seconds: those of the wall, unless a program asks otherwise."""
    progress: Progress = field(default_factory=Silent)

    def cost(self, recipe: Recipe) -> Cost:
        """Of the recipe on the whole model."""
        return cost(recipe, self.known.map, size_of(self.known.checked))

    def trial(self, recipe: Recipe, data: CalibrationData | None) -> Trial:
        """Run the recipe's passes on a few blocks; the model's files stay as they are.

        Raises: CompressError where the passes cannot work on few blocks, and whatever `compress` would.
        """
        recipe = fitted_to_model(recipe, self.known.map)
        left_out = tuple(PASSES.name_of(type(each)) for each in recipe.passes if _trains(each))
        tried = recipe.model_copy(update={"passes": tuple(each for each in recipe.passes if not _trains(each))})
        if not tried.passes:
            raise CompressError(
                "plan.no-trial",
                "every pass of this recipe trains the whole model: a few blocks say nothing of that",
                where=", ".join(left_out),
                fix="make the plan without a probe",
            )
        whole = self.cost(tried)
        at_once = any(isinstance(each, ModelPass) or each.decides for each in tried.passes)
        counts = _WITH_HEAD if whole.head_operations else _WITH_WHOLE if at_once else _STREAMED
        kinds = kinds_of_blocks(tried, self.known.map)
        chosen = dict.fromkeys(blocks_of_each_kind(kinds, count) for count in counts)
        runs = [self._measured(tried, blocks, data) for blocks in chosen]
        seconds = _stream_seconds(runs, kinds) + _whole_model_seconds(runs, whole)
        if left_out:
            machine = this_machine(self.device)
            seconds *= machine.seconds(self.cost(recipe)) / max(machine.seconds(whole), 1e-9)
        return Trial(seconds, blocks=runs[-1].blocks, left_out=left_out)

    @property
    def _checked(self) -> Preflight:
        assert isinstance(self.known.checked, Preflight), "a trial reads weights from files"
        return self.known.checked

    def windows(self, recipe: Recipe) -> CalibrationData | None:
        """The recipe's calibration data; None where no pass needs them.

        Raises: CompressError as for a run.
        """
        if not any(each.uses_data() for each in recipe.passes):
            return None
        return calibration_windows(
            recipe.calibration,
            self._checked.tokenizer,
            max_positions=size_of(self._checked).max_positions,
            seed=recipe.seed,
            progress=self.progress,
            held_out=recipe.guard.windows,
        )

    def _measured(self, recipe: Recipe, blocks: tuple[int, ...], data: CalibrationData | None) -> _Measured:
        self.progress.stage(f"trial on {len(blocks)} blocks", 1)
        with TemporaryDirectory() as scratch:
            model, weights = map_weights(
                self.source.folder,
                copy.deepcopy(self._checked.config),  # blocks are taken out of it too
                Path(scratch),
                dtype=self._checked.storage_dtype,
                trust_remote_code=recipe.trust_remote_code,
            )
            unfuse_experts(model, weights)
            drop_blocks(model, set(range(len(self.known.map.blocks))) - set(blocks))
            model.to(torch.float32)
            few = map_model(model)
            recipe = at_new_places(recipe, self.known.map, few, blocks)
            context = RunContext(
                data.windows_NT if data else torch.zeros(0, 1, dtype=torch.long),
                held_out_NT=data.held_out_NT if data and recipe.guard.fall_back else None,
                device=self.device,
                storage_dtype=storage_dtype_of(recipe.save, self._checked),
                seed=recipe.seed,
                **recipe.calibration.of_blocks(self.device),
            )
            torch.manual_seed(recipe.seed)
            with _TimedRun.open(Path(scratch) / "trial", fingerprint={}, lock_text="", fresh=True) as run:
                run.clock, started = self.clock, self.clock()
                apply_passes(model, few, recipe.passes, replace(context, keep=run))
                return _Measured(run.parts(started), blocks, cost(recipe, few, size_of(self._checked)))


def kinds_of_blocks(recipe: Recipe, model_map: ModelMap) -> tuple[tuple[int, ...], ...]:
    """Blocks that have the same structure and for which the recipe says the same, together."""
    passes = [each for each in recipe.passes if isinstance(each, BlockPass)]
    kinds: dict[object, list[int]] = {}
    for block in model_map.blocks:
        names = [block.full(site.name) for site in block.structure.sites]
        told = tuple((each.selects(name), repr(each.for_site(name))) for each in passes for name in names)
        kinds.setdefault((id(block.structure), told), []).append(block.index)
    return tuple(map(tuple, kinds.values()))


def blocks_of_each_kind(kinds: Sequence[Sequence[int]], count: int) -> tuple[int, ...]:
    """The first so many of each."""
    return tuple(sorted(index for alike in kinds for index in alike[:count]))


def at_new_places(recipe: Recipe, model_map: ModelMap, few: ModelMap, blocks: Sequence[int]) -> Recipe:
    """The recipe for a model of these blocks alone: what it says of a block, it says of that block at its new place."""
    old = {
        new.full(site.name): model_map.blocks[index].full(site.name)
        for new, index in zip(few.blocks, blocks, strict=True)
        for site in new.structure.sites
    }
    return recipe.model_copy(update={"passes": tuple(_renamed(recipe.passes, old))})


def _renamed(passes: Sequence[Pass], old: Mapping[str, str]) -> Iterator[Pass]:
    """`old`: new name of a site → its name in the whole model. Where globs match none of these they stay as they are:
    they name what an earlier pass makes.
    """
    for each in passes:
        selected = tuple(new for new, name in old.items() if each.selects(name))
        if not isinstance(each, BlockPass) or not selected:
            yield each
            continue
        overrides: dict[str, dict[str, object]] = {}
        for new in selected:
            for glob, options in each.overrides.items():
                if matches(old[new], glob):
                    overrides[new] = {**overrides.get(new, {}), **options}
        yield type(each)(**{**each.model_dump(), "sites": selected, "exclude": (), "overrides": overrides})


def _trains(each: Pass) -> bool:
    gradients = each.backward()
    return bool(gradients and gradients.trained_on) or bool(each.teachers())


def _operations(taken: Cost) -> float:
    return taken.operations + taken.head_operations


def _stream_seconds(runs: Sequence[_Measured], kinds: Sequence[Sequence[int]]) -> float:
    """Of all blocks of the whole model, in all stages that go block by block."""
    kind_of = {index: alike for alike in kinds for index in alike}
    found: dict[tuple[int, Sequence[int]], list[float]] = {}
    for run in runs:
        for part in run.parts:
            if part.block:
                found.setdefault((part.stage, kind_of[run.blocks[part.block]]), []).append(part.seconds)
    first = runs[0].blocks[0]
    others = sum(fmean(seconds) * (len(alike) - (first in alike)) for (_, alike), seconds in found.items())
    return fmean(run.first_block_seconds for run in runs) + others


def _whole_model_seconds(runs: Sequence[_Measured], whole: Cost) -> float:
    """Of decisions about the whole model and passes on it: per operation of blocks, and per operation of the head or,
    where that computes nothing, once.
    """
    seconds = [run.whole_model_seconds for run in runs]
    counted = [_counted(run.taken) for run in runs]
    operations, besides = _counted(whole)
    if counted[0][0] != counted[-1][0]:
        wanted = torch.tensor(seconds, dtype=torch.float64)
        of_blocks, of_others = torch.linalg.solve(torch.tensor(counted, dtype=torch.float64), wanted).tolist()
        # without a head the fixed part may be negative: the last block of a stream feeds no other
        if of_blocks >= 0 and (of_others >= 0 or not whole.head_operations):
            return float(of_blocks * operations + of_others * besides)
        if of_blocks < 0:  # less than the clock tells
            return sum(seconds) / sum(others for _, others in counted) * besides
    return sum(seconds) * _operations(whole) / max(sum(_operations(run.taken) for run in runs), 1.0)


def _counted(taken: Cost) -> tuple[float, float]:
    return taken.operations, taken.head_operations or 1.0
