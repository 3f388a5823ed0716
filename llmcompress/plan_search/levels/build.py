"""`build_levels`: one stream of the dense model over its blocks, in which every option is tried on every linear.

Inputs are those that the dense model gives; the statistics of an input are measured once, for all options. What is
finished is in the store: a build that was killed goes on at the block where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.environment import numeric_versions
from llmcompress.loading.in_memory import identity_in_memory
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import BlockPass, Pass
from llmcompress.plan_search.levels.before import model_after
from llmcompress.plan_search.levels.block_levels import BlockLevels
from llmcompress.plan_search.levels.difference import Difference
from llmcompress.plan_search.levels.folder import block_key
from llmcompress.plan_search.levels.losses import Sensitivities
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.levels.work import BodyWork, Inputs, Known, OptionWork, not_local
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.space import DROPPED
from llmcompress.progress import Progress, Silent

Decisions = Mapping[str, Tensor]


def build_levels(
    whole: WholeModel, space: PlanSpace, store: LevelStore, *, progress: Progress | None = None
) -> LevelStore:
    """Fill the store with every level of every block that it does not have yet; the model is not changed.

    Raises: CompressError when the store holds levels of something else, or an option cannot be a level.
    """
    progress = progress or whole.context.progress
    whole.context.processes.require_one("a search")
    whole.context.weights_at.require_memory("a search")
    _check(space)
    with store.writing(settings_of(whole, space)):
        progress.stage("levels", len(space.space.before) * len(whole.map.blocks))
        for number, before in enumerate(space.space.before):
            _Build(model_after(whole, space, store, before), space, store, number).run(progress)
    return store


def settings_of(whole: WholeModel, space: PlanSpace) -> dict[str, Any]:
    """Everything that levels depend on, as JSON holds it."""
    context, choices = whole.context, space.space
    windows = hashlib.sha256(context.windows_NT.contiguous().numpy().tobytes()).hexdigest()
    return {
        "versions": numeric_versions(),
        "model": identity_in_memory(whole.model),
        "windows": windows,
        "shape": list(context.windows_NT.shape),
        "batch": context.batch,
        "storage_dtype": str(context.storage_dtype),
        "seed": context.seed,
        "experts": context.experts,
        "before": _written(choices.before),
        "bodies": _written(choices.bodies),
        "sites": _written(choices.sites),
    }


def _written(choices: Mapping[str, Sequence[Pass]]) -> dict[str, Any]:
    return {
        name: [{each.__class__.__name__: each.model_dump(mode="json")} for each in passes]
        for name, passes in choices.items()
    }


class _Build:
    """The levels of one model: the dense one, or what a choice of `before` made of it."""

    def __init__(self, whole: WholeModel, space: PlanSpace, store: LevelStore, before: int) -> None:
        self._whole, self._space, self._store, self._before = whole, space.space, store, before

    def run(self, progress: Progress) -> None:
        """All blocks that the store does not have."""
        blocks = self._whole.map.blocks
        keys = [block_key(self._before, info.index) for info in blocks]
        if all(map(self._store.is_finished, keys)):
            return
        for each in self._passes():
            each.check(self._whole.map)
        progress.substep("decisions")
        self._decisions = self._decided()
        self._check_narrow()
        progress.substep("gradients")
        self._felt = Sensitivities(self._whole)
        for work in self._whole.stream():
            if not self._store.is_finished(keys[work.info.index]):
                levels = self._levels(work, progress)
                levels.save(self._store, keys[work.info.index], self._whole.context.storage_dtype)
            progress.step(f"block {work.info.index + 1}/{len(blocks)}")

    def _check_narrow(self) -> None:
        """Every option fits what the bodies make of the first block: told now, not after minutes of gradients."""
        work = next(self._whole.stream())
        _run_dense(work)
        for body in self._space.bodies.values():
            info = self._body(work, body).info if body else work.info
            names = [info.full(site.name) for site in info.structure.sites]
            for each in (each for passes in self._space.sites.values() for each in passes):
                if any(map(each.selects, names)):
                    each.check(replace(self._whole.map, blocks=(info,)))

    def _passes(self) -> list[BlockPass]:
        choices = (*self._space.bodies.values(), *self._space.sites.values())
        return [each for passes in choices for each in passes if isinstance(each, BlockPass)]

    def _decided(self) -> dict[int, Decisions]:
        """Per pass, by its place: what it decided about the whole model."""
        key = f"{self._before:02d}-decisions"
        if not self._store.is_finished(key):
            tensors: dict[str, Tensor] = {}
            context = self._whole.context.at(key)
            for place, each in enumerate(self._passes()):
                if each.decides:
                    found = each.decide(self._whole.within(context))
                    tensors |= {f"{place}:{name}": tensor for name, tensor in found.items()}
            self._store.save(key, tensors, {})
        known: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._store.file(key).tensors().items():
            number, _, own = name.partition(":")
            known.setdefault(int(number), {})[own] = tensor
        return {place: known.get(place, {}) for place in range(len(self._passes()))}

    def _levels(self, work: BlockWork, progress: Progress) -> BlockLevels:
        """Of one block, which stays as it is."""
        found = BlockLevels()
        dense = _run_dense(work)
        found.body_losses[DROPPED] = self._felt.block_loss(work.info.index, dense, work.dense_inputs)
        first: Inputs | None = None
        for body in self._space.bodies:
            progress.substep(f"body {body} of {work.info.name}")
            narrow = self._body(work, self._space.bodies[body])
            found.bodies[body] = difference = Difference.of(narrow.module, work.module)
            found.sizes[body] = {site.name: (site.outputs, site.inputs) for site in narrow.info.structure.sites}
            outputs = narrow.outputs() if difference else dense
            found.body_losses[body] = self._felt.block_loss(work.info.index, dense, outputs)
            same: list[str] = []
            known: Known = {}
            if first is not None:
                changed = frozenset(site.name for site in narrow.info.structure.sites if difference.of_site(site.name))
                local = not difference.outside(site.name for site in narrow.info.structure.sites)
                known = first.before(changed) if local else {}
                same = [name for name in known if name not in changed]
            inputs = Inputs(narrow, known)
            first = first or inputs
            found.same[body] = same
            found.sites[body], found.losses[body] = self._options(narrow, inputs, frozenset(same), progress)
            if same:
                whole_losses = found.losses[next(iter(self._space.bodies))]
                found.losses[body] |= {name: whole_losses.get(name, {}) for name in same}
        return found

    def _body(self, work: BlockWork, passes: Sequence[Pass]) -> BodyWork:
        """The block with that body."""
        narrow = work.copy(BodyWork, _quiet(self._whole.context, passes))
        narrow.begin()
        for each in passes:
            self._run(each, narrow)
        if passes:
            narrow.round_to_storage_dtype()
        return narrow

    def _run(self, each: Pass, work: BlockWork) -> None:
        assert isinstance(each, BlockPass)
        work.decisions = self._decisions[next(at for at, known in enumerate(self._passes()) if known is each)]
        each.run(work)

    def _options(
        self, narrow: BodyWork, inputs: Inputs, same: frozenset[str], progress: Progress
    ) -> tuple[dict[str, dict[str, Difference]], dict[str, dict[str, float]]]:
        """Levels and losses of all options, site by site, on one body."""
        names = [site.info.name for site in narrow.sites if site.info.name not in same]
        levels: dict[str, dict[str, Difference]] = {name: {} for name in names}
        losses: dict[str, dict[str, float]] = {name: {} for name in names}
        inputs.statistics(names, self._statistics())
        for option, passes in self._space.sites.items():
            if not passes:
                continue
            progress.substep(f"{option}, {narrow.info.name}")
            trial = narrow.copy(OptionWork, _quiet(self._whole.context, passes))
            trial.measured = inputs
            trial.sites = tuple(site for site in trial.sites if site.info.name not in same)
            for each in passes:
                self._run(each, trial)
            trial.round_to_storage_dtype()
            difference = Difference.of(trial.module, narrow.module)
            if outside := difference.outside(site.name for site in narrow.info.structure.sites):
                not_local(narrow.info.full(outside[0]))
            for site in trial.sites:
                name = site.info.name
                if own := difference.of_site(name):
                    levels[name][option] = own
                    change_OI = site.weight_OI - narrow.site(name).weight_OI
                    gram = inputs.statistics([name], (Gram,))[name][Gram]
                    assert isinstance(gram, Gram)
                    losses[name][option] = self._felt.site_loss(
                        site.name, change_OI, gram.sum_II, narrow.rows.get(name)
                    )
        return levels, losses

    def _statistics(self) -> tuple[type[Statistic], ...]:
        """What all options need, and what losses are computed from."""
        asked = [each for passes in self._space.sites.values() for each in passes if isinstance(each, BlockPass)]
        return tuple(dict.fromkeys((Gram, *(kind for each in asked for kind in each.needs()))))


def _run_dense(work: BlockWork) -> list[Tensor]:
    """The block's outputs, which it then knows."""
    dense = work.outputs()
    work.replace_module(work.module, dense)
    work.dense_inputs, work.dense_outputs = work.inputs(), dense
    return dense


def _quiet(context: RunContext, passes: Sequence[Pass]) -> RunContext:
    """As a recipe with these passes gives it to them; a pass tells of every block, which is too often here."""
    pruned = any(not {"zeros", "pattern"}.isdisjoint(each.traits()) for each in passes)
    return replace(context, progress=Silent(), zeros_are_masks=pruned)


def _check(space: PlanSpace) -> None:
    """Raises: CompressError for an option whose later passes need another map than the dense model's."""
    for kind, choices in (("bodies", space.space.bodies), ("sites", space.space.sites)):
        for name, passes in choices.items():
            for earlier, later in pairwise(passes):
                if isinstance(earlier, BlockPass) and earlier.changes_sites:
                    raise CompressError(
                        "search.after-shapes",
                        f"`{kind}: {name}` goes on with `{type(later).__name__}` after a pass that changes the linears",
                        where=f"{kind}: {name}",
                        fix="name one pass that does both, or one choice of `bodies` and one of `sites`",
                        exit_code=ExitCode.USAGE,
                    )
