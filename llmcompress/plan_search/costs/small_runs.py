"""What small models take that differ in depth or body: seconds, peak memory, and the power while one runs."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.evaluation.device.energy import Watch, measure_energy
from llmcompress.evaluation.device.instruments import Unreadable, find_instrument
from llmcompress.evaluation.device.peak_memory import MemoryRequest, peak_memory
from llmcompress.evaluation.device.speed import ClockName, compare_speed, random_prompt
from llmcompress.exporters.base import Refused
from llmcompress.exporters.contents import CodedLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.plan_search.costs.bench import BENCHES, Bench, ExportedBench, Unmeasurable
from llmcompress.plan_search.costs.forms import DENSE, Forms, Matrix
from llmcompress.plan_search.costs.latency_table import NOTHING, BlockRest, Power, Product, Seconds, shapes_of
from llmcompress.plan_search.costs.small_models import VOCABULARY, small_model, with_matrix
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.space import Passes
from llmcompress.progress import Progress
from llmcompress.records.cost import Speed

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 2**25
TIMES_THE_CACHE = 2
"""Weights of that many bytes leave nothing of the first ones in the cache when they come again."""
_FLOAT = 4

Name = tuple[object, ...]
"""What a small model is told apart by."""


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """What is measured, and how."""

    batch: int = 1
    context: int = 128
    new_tokens: int = 32
    turns: int = 5
    """Of everything; between turns of a product all others are measured."""
    threads: int | None = None
    """Of torch; None: as many as it has."""
    clock: ClockName = "wall"
    memory: bool = True
    """Two processes are started for every body."""
    power: bool = True
    """Takes seconds where a counter can be read."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class SmallRuns:
    """Small models of one model in one runtime."""

    space: PlanSpace
    config: PretrainedConfig
    bench: Bench
    settings: LatencySettings
    forms: Forms
    progress: Progress
    missing: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    @property
    def table_weights(self) -> int:
        """Of the embedding."""
        return self.space.model_map.vocabulary * self.space.model_map.hidden_size

    def leave_out(self, what: str, why: str) -> None:
        """Tell that the table lacks something."""
        self.missing.append(f"{what}: {why}")
        self.progress.note(f"{what} is not in the table: {why}")

    def blocks(self, products: Mapping[Matrix, Product]) -> tuple[tuple[BlockRest, ...], Seconds]:
        """What is left of every body without its linears, and what is left without any block."""
        few, many = self._depths()
        bodies = self.space.space.bodies
        speeds = self._speeds(
            {
                (body, deep): partial(small_model, self.config, deep, passes)
                for body, passes in bodies.items()
                for deep in (few, many)
            }
        )
        rows, outside = [], list[Seconds]()
        for body in bodies:
            shallow, deep = speeds[body, few], speeds[body, many]
            block = _median(
                _scaled(both.plus(one, -1.0), 1 / (many - few))
                for one, both in zip(shallow.turns, deep.turns, strict=True)
            )
            outside.append(shallow.seconds.plus(block, -float(few)).at_least(0.0))
            info = self.forms.blocks[0, body]
            for site in info.structure.sites:
                block = block.plus(products[Matrix(site.outputs, site.inputs)].seconds, -1.0)
            rows.append(
                BlockRest(shapes=shapes_of(info), seconds=block.at_least(0.0), spread=max(shallow.spread, deep.spread))
            )
        return tuple(rows), outside[0]

    def differences(self, wanted: Sequence[Matrix]) -> tuple[Product, ...]:
        """What linears take in another form than dense, each in a model of its own; dense ones count as nothing."""
        bodies, (_, many) = self.space.space.bodies, self._depths()
        body_of = {
            Matrix(site.outputs, site.inputs): body
            for body in reversed(bodies)
            for site in self.forms.blocks[0, body].structure.sites
        }
        dense = {body: partial(small_model, self.config, many, passes) for body, passes in bodies.items()}
        coded = {
            matrix: partial(_with_matrix, dense[body_of[Matrix(matrix.outputs, matrix.inputs)]], matrix)
            for matrix in wanted
            if matrix.form != DENSE and self._can_hold(matrix)
        }
        speeds = self._speeds(
            {**{("dense", body): make for body, make in dense.items()}, **{(m,): make for m, make in coded.items()}}
        )
        rows = [_row(matrix, [NOTHING], 0.0, self.bench) for matrix in wanted if matrix.form == DENSE]
        for matrix in coded:
            shape = Matrix(matrix.outputs, matrix.inputs)
            sites = self.forms.blocks[0, body_of[shape]].structure.sites
            count = many * sum((site.outputs, site.inputs) == (shape.outputs, shape.inputs) for site in sites)
            changed, plain = speeds[(matrix,)], speeds["dense", body_of[shape]]
            turns = [
                _scaled(one.plus(other, -1.0), 1 / count) for one, other in zip(changed.turns, plain.turns, strict=True)
            ]
            rows.append(_row(matrix, turns, max(changed.spread, plain.spread), self.bench))
        return tuple(rows)

    def heads(self, passes_of: Mapping[Matrix, Passes]) -> tuple[Product, ...]:
        """What the whole vocabulary takes, its head in each of these forms."""
        few, _ = self._depths()
        rows = self.space.model_map.vocabulary
        makers: dict[tuple[object, ...], Callable[[], PreTrainedModel]] = {
            (head,): partial(small_model, self.config, few, passes, vocabulary=rows)
            for head, passes in passes_of.items()
        }
        speeds = self._speeds({("short",): partial(small_model, self.config, few, ()), **makers})
        short, found = speeds[("short",)], []
        for head in passes_of:
            whole = speeds[(head,)]
            turns = [one.plus(other, -1.0) for one, other in zip(whole.turns, short.turns, strict=True)]
            found.append(_row(head, turns, whole.spread, self.bench))
        return tuple(found)

    def _can_hold(self, matrix: Matrix) -> bool:
        if isinstance(self.bench, ExportedBench):
            site = CodedLinear("", named_scheme(matrix.form), matrix.outputs, matrix.inputs)
            answer = self.bench.exporter.check(site, self.bench.dtype)
            if isinstance(answer, Refused):
                self.leave_out(f"{matrix.outputs}×{matrix.inputs} {matrix.form}", answer.why)
                return False
        return True

    def memory(self, blocks: Sequence[BlockRest]) -> tuple[tuple[BlockRest, ...], int | None]:
        """The same blocks with what they take in memory besides their linears, and what is left without any block."""
        few, many = self._depths()
        rows, outside = [], list[int]()
        for body, row in zip(self.space.space.bodies, blocks, strict=True):
            self.progress.substep(f"peak memory, body {body}")
            info = self.forms.blocks[0, body]
            linears = sum(self.bench.held_bytes(Matrix(site.outputs, site.inputs)) for site in info.structure.sites)
            try:
                shallow, deep = (self._peak(body, depth) for depth in (few, many))
            except Unmeasurable as problem:
                self.leave_out("peak memory", str(problem))
                return tuple(blocks), None
            of_one = (deep - shallow) // (many - few)
            rows.append(row.model_copy(update={"bytes": of_one - linears}))
            outside.append(shallow - few * of_one)
        untied = 0 if self.space.model_map.tied else _FLOAT * self.table_weights
        return tuple(rows), outside[0] + untied

    def power(self) -> Power | None:
        """Watts above idle while a small model runs; None where no counter can be read."""
        try:
            instrument = find_instrument(self.bench.device)
        except Unreadable as problem:
            self.leave_out("power", str(problem))
            return None
        (_, many), chosen, (body, *_) = self._depths(), self.settings, self.space.space.bodies.values()
        prompt_BT = random_prompt(VOCABULARY, batch=chosen.batch, tokens=chosen.context)
        with (
            tempfile.TemporaryDirectory(prefix="llmcompress-latency-") as folder,
            self.bench.open(small_model(self.config, many, body), Path(folder)) as runner,
        ):
            speeds = compare_speed({"": runner}, {"": prompt_BT}, new_tokens=chosen.new_tokens, repeats=chosen.turns)
            found = measure_energy(Watch(instrument), runner, prompt_BT, new_tokens=chosen.new_tokens)
        if found.prefill_joules_per_token is None or found.decode_joules_per_token is None:
            self.leave_out("power", str(found.unavailable))
            return None
        return Power(
            instrument=instrument.name,
            prefill=found.prefill_joules_per_token * speeds[""].prefill.median,
            decode=found.decode_joules_per_token * speeds[""].decode.median,
        )

    def _peak(self, body: str, deep: int) -> int:
        """Of a small model in a fresh process.

        Raises: Unmeasurable with the reason.
        """
        chosen = self.settings
        with tempfile.TemporaryDirectory(prefix="llmcompress-latency-") as folder:
            self.bench.save(small_model(self.config, deep, self.space.space.bodies[body]), Path(folder))
            request = MemoryRequest(
                model=folder,
                runtime=BENCHES.name_of(type(self.bench)),
                device=str(self.bench.device),
                dtype=str(self.bench.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                settings=((chosen.batch, chosen.context),),
                new_tokens=chosen.new_tokens,
            )
            (found,) = peak_memory(request)
        if found.running is None:
            raise Unmeasurable(str(found.unavailable))
        return found.running

    def _depths(self) -> tuple[int, int]:
        """Half of that many blocks and all of them leave nothing of the first in the caches; no more than there are."""
        blocks = self.space.model_map.blocks
        of_one = 4 * sum(site.outputs * site.inputs for site in blocks[0].structure.sites)
        many = min(max(2, ceil(2 * TIMES_THE_CACHE * cache_bytes() / of_one)), max(2, len(blocks)))
        return many // 2, many

    def _speeds(self, makers: Mapping[Name, Callable[[], PreTrainedModel]]) -> dict[Name, _Took]:
        with ExitStack() as stack:
            runners = {}
            for number, make in enumerate(makers.values()):
                self.progress.substep(f"small model {number + 1} of {len(makers)}")
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcompress-latency-")))
                runners[str(number)] = stack.enter_context(self.bench.open(make(), folder))
            chosen = self.settings
            prompt_BT = random_prompt(VOCABULARY, batch=chosen.batch, tokens=chosen.context)
            speeds = compare_speed(
                runners,
                dict.fromkeys(runners, prompt_BT),
                new_tokens=chosen.new_tokens,
                repeats=chosen.turns,
                clock=chosen.clock,
            )
            return {name: _Took.of(speeds[str(number)], chosen) for number, name in enumerate(makers)}


@dataclass(frozen=True)
class _Took:
    turns: tuple[Seconds, ...]
    """Of a whole prefill and of one step; what was measured in one turn compares best."""
    spread: float

    @property
    def seconds(self) -> Seconds:
        """Medians."""
        return _median(self.turns)

    @classmethod
    def of(cls, speed: Speed, settings: LatencySettings) -> _Took:
        """From rates."""
        tokens = settings.batch * settings.context
        turns = tuple(
            Seconds(prefill=tokens / prefill, decode=settings.batch / decode)
            for prefill, decode in zip(speed.prefill.turns, speed.decode.turns, strict=True)
        )
        return cls(turns, max(speed.prefill.spread, speed.decode.spread))


def cache_bytes(folder: Path = _CACHES) -> int:
    """Of the largest cache of a processor."""
    sizes = []
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=_USUAL_CACHE)


def _with_matrix(make: Callable[[], PreTrainedModel], matrix: Matrix) -> PreTrainedModel:
    return with_matrix(make(), matrix)


def _row(matrix: Matrix, turns: Sequence[Seconds], spread: float, bench: Bench) -> Product:
    size = {"outputs": matrix.outputs, "inputs": matrix.inputs, "bytes": bench.held_bytes(matrix)}
    return Product(form=matrix.form, seconds=_median(turns), spread=spread, **size)


def _median(turns: Iterable[Seconds]) -> Seconds:
    """Of each phase."""
    rows = list(turns)
    return Seconds(
        prefill=statistics.median(each.prefill for each in rows), decode=statistics.median(each.decode for each in rows)
    )


def _scaled(seconds: Seconds, by: float) -> Seconds:
    return Seconds(prefill=by * seconds.prefill, decode=by * seconds.decode)
