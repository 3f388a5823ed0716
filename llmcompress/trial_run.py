"""The recipe for real on a few blocks of the model, to estimate how long it takes on all of them.

What an operation of this recipe takes is measured on one block of each kind, with its calibration windows and
settings, and multiplied by the operations of the whole run (`cost.py`). Where something does not grow with the blocks
(logits for gradients and searches by perplexity, a rounded embedding), two runs of different depth tell it apart.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.token_windows import CalibrationData
from llmcompress.cost import Cost, cost
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
from llmcompress.passes.base import PASSES, BlockPass, ModelPass, Pass, matches
from llmcompress.planning import Plan, fitted_to_model, storage_dtype_of
from llmcompress.progress import Progress, Silent
from llmcompress.recipe.model import Recipe

_OF_EACH_KIND, _WITH_FIXED, _WITH_HEAD = (1,), (1, 2), (2, 4)
"""How many blocks of each kind the runs have: where all grows with the blocks; where passes on the whole model take a
time of their own; where the head computes logits, which takes longer than a block."""


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    seconds_per_operation: float
    seconds_per_head_operation: float
    fixed_seconds: float
    """Of passes on the whole model, whatever its depth."""
    blocks: tuple[int, ...]
    """Those of the largest run."""
    left_out: tuple[str, ...]
    """Passes that train the whole model."""

    def seconds(self, taken: Cost) -> float:
        """How long a recipe of that cost takes on this machine."""
        head = self.seconds_per_head_operation * taken.head_operations
        return self.seconds_per_operation * taken.operations + head + self.fixed_seconds

    def applied_to(self, plan: Plan, taken: Cost) -> Plan:
        """The plan with the seconds that the whole recipe is going to take."""
        note = f"{', '.join(self.left_out)}: not part of the trial, estimated from operations" if self.left_out else ""
        warnings = (*plan.warnings, note) if note else plan.warnings
        found = {"estimated_seconds": self.seconds(taken), "probed_blocks": self.blocks, "warnings": warnings}
        return plan.model_copy(update=found)


def with_trial(plan: Plan, recipe: Recipe, bench: Bench) -> Plan:
    """The plan with the seconds that a trial estimates; as it was, with the reason, where few blocks do not do.

    Raises: CompressError as the calibration text does.
    """
    data = bench.windows(recipe)
    try:
        trial = bench.trial(recipe, data)
    except CompressError as problem:
        return plan.model_copy(
            update={"warnings": (*plan.warnings, f"time is estimated from operations: {problem.what}")}
        )
    return trial.applied_to(plan, bench.cost(recipe))


@dataclass(frozen=True)
class _Measured:
    """One run on a few blocks."""

    seconds: float
    taken: Cost


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
        counts = _WITH_FIXED if any(isinstance(each, ModelPass) for each in tried.passes) else _OF_EACH_KIND
        counts = _WITH_HEAD if self.cost(tried).head_operations else counts
        chosen = [blocks_of_each_kind(tried, self.known.map, count) for count in counts]
        runs = [self._measured(tried, blocks, data) for blocks in dict.fromkeys(chosen)]
        return Trial(*_speeds(runs), blocks=chosen[-1], left_out=left_out)

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

    def _measured(self, recipe: Recipe, blocks: Sequence[int], data: CalibrationData | None) -> _Measured:
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
                batch=recipe.calibration.batch,
                device=self.device,
                storage_dtype=storage_dtype_of(recipe.save, self._checked),
                seed=recipe.seed,
                experts=recipe.calibration.experts,
            )
            torch.manual_seed(recipe.seed)
            started = self.clock()
            apply_passes(model, few, recipe.passes, context)
            return _Measured(self.clock() - started, cost(recipe, few, size_of(self._checked)))


def blocks_of_each_kind(recipe: Recipe, model_map: ModelMap, count: int) -> tuple[int, ...]:
    """The first so many of all blocks that have the same structure and for which the recipe says the same."""
    passes = [each for each in recipe.passes if isinstance(each, BlockPass)]
    kinds: dict[object, list[int]] = {}
    for block in model_map.blocks:
        names = [block.full(site.name) for site in block.structure.sites]
        told = tuple((each.selects(name), repr(each.for_site(name))) for each in passes for name in names)
        kinds.setdefault((id(block.structure), told), []).append(block.index)
    return tuple(sorted(index for of_kind in kinds.values() for index in of_kind[:count]))


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


def _speeds(runs: Sequence[_Measured]) -> tuple[float, float, float]:
    """Seconds per operation of blocks, seconds per operation of the head, seconds besides."""
    seconds = sum(run.seconds for run in runs)
    together = seconds / max(sum(run.taken.operations + run.taken.head_operations for run in runs), 1.0)
    has_head = any(run.taken.head_operations for run in runs)
    parts = [[run.taken.operations, run.taken.head_operations if has_head else 1.0] for run in runs]
    alike = len(runs) < 2 or parts[0][0] == parts[1][0]
    if not alike:
        wanted = torch.tensor([run.seconds for run in runs], dtype=torch.float64)
        of_blocks, besides = torch.linalg.solve(torch.tensor(parts, dtype=torch.float64), wanted).tolist()
        if of_blocks > 0 and besides >= 0:
            return (of_blocks, besides, 0.0) if has_head else (of_blocks, 0.0, besides)
    return together, together, 0.0
