"""Measures a latency table on this device: products, one after the other, and small models in turns."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.evaluation.device.limits import device_name
from llmcompress.evaluation.device.pinning import pinned
from llmcompress.evaluation.device.speed import CLOCKS, Clock, ClockName, compare_speed, random_prompt
from llmcompress.progress import Progress, Silent
from llmcompress.records.cost import Speed
from llmcompress.search.costs.bench import BENCHES, Bench, Unmeasurable
from llmcompress.search.costs.forms import Forms, Matrix
from llmcompress.search.costs.latency_table import NOTHING, BlockRest, LatencyTable, Product, Seconds, shapes_of
from llmcompress.search.costs.seconds import wanted_matrices
from llmcompress.search.costs.small_models import VOCABULARY, small_model
from llmcompress.search.plan_space import PlanSpace

Name = tuple[str, int]
"""Body, and how many blocks."""
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 2**25
_TIMES_THE_CACHE = 2
"""Weights of that many bytes leave nothing of the first ones in the cache when they come again."""
_MOST_COPIES = 1024
_LEAST_RUNS, _LEAST_SECONDS = 3, 0.04
"""Of one turn of one product."""


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
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def measure_latency(
    space: PlanSpace,
    config: PretrainedConfig,
    runtime: str,
    *,
    settings: LatencySettings | None = None,
    forms: Forms | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Everything that a plan of the space may have, in that runtime; no weights of the model are needed.

    Forms that the runtime has no product for are left out, and told.
    """
    chosen, progress, forms = settings or LatencySettings(), progress or Silent(), forms or Forms(space)
    bench = BENCHES[runtime](torch.device(chosen.device), chosen.dtype)
    with pinned(chosen.threads) as pinning:
        session = _Session(space, config, bench, chosen, forms, progress)
        heads = session.heads()
        products = session.products()
        blocks, outside = session.blocks({each.matrix: each.seconds for each in products})
        return LatencyTable(
            runtime=runtime,
            by="microbenchmarks",
            versions=bench.versions(),
            device=device_name(bench.device),
            processor=_processor(),
            threads=pinning.threads,
            clock=chosen.clock,
            batch=chosen.batch,
            context=chosen.context,
            turns=chosen.turns,
            products=products,
            heads=heads,
            blocks=blocks,
            outside=outside,
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )


@dataclass(frozen=True)
class _Session:
    space: PlanSpace
    config: PretrainedConfig
    bench: Bench
    settings: LatencySettings
    forms: Forms
    progress: Progress

    def products(self) -> tuple[Product, ...]:
        """Of all matrices that linears may become."""
        wanted, _ = wanted_matrices(self.space, self.forms)
        return self._timed(wanted, self.settings.context, tied=False)

    def heads(self) -> tuple[Product, ...]:
        """Of all matrices that the output head may become."""
        _, wanted = wanted_matrices(self.space, self.forms)
        tokens = self.settings.context if self.bench.head_sees_prompt else 1
        return self._timed(wanted, tokens, tied=self.space.model_map.tied)

    def blocks(self, products: Mapping[Matrix, Seconds]) -> tuple[tuple[BlockRest, ...], Seconds]:
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
            block = _scaled(deep.seconds.plus(shallow.seconds, -1.0), 1 / (many - few))
            outside.append(shallow.seconds.plus(block, -float(few)))
            info = self.forms.blocks[0, body]
            for site in info.structure.sites:
                block = block.plus(products.get(Matrix(site.outputs, site.inputs), NOTHING), -1.0)
            rows.append(BlockRest(shapes=shapes_of(info), seconds=block, spread=max(shallow.spread, deep.spread)))
        return tuple(rows), outside[0]

    def _timed(self, wanted: Sequence[Matrix], prompt: int, *, tied: bool) -> tuple[Product, ...]:
        """In turns: of each product as many as fit into memory at once are measured, then the next one is."""
        took: dict[Matrix, list[Seconds]] = {}
        for turn in range(self.settings.turns):
            for matrix in wanted:
                self.progress.substep(f"turn {turn + 1}: {matrix.outputs}×{matrix.inputs} {matrix.form}")
                try:
                    found = self._one(matrix, prompt, tied=tied)
                except Unmeasurable as problem:
                    if not turn:
                        self.progress.note(f"{matrix.form} is left out: {problem}")
                    continue
                took.setdefault(matrix, []).append(found)
        return tuple(_product(matrix, turns) for matrix, turns in took.items())

    def _one(self, matrix: Matrix, prompt: int, *, tied: bool) -> Seconds:
        copies = self._copies(matrix)
        run_for = self.bench.products(matrix, copies, tied=tied)
        clock, batch = CLOCKS[self.settings.clock], self.settings.batch
        return Seconds(
            prefill=_seconds(run_for(batch * prompt), clock) / copies, decode=_seconds(run_for(batch), clock) / copies
        )

    def _copies(self, matrix: Matrix) -> int:
        """As many weights as come between two uses of one in the model, or as the caches do not hold."""
        sites = [site for block in self.space.model_map.blocks for site in block.structure.sites]
        head = self.space.model_map.vocabulary * self.space.model_map.hidden_size
        weights = sum(site.outputs * site.inputs for site in sites) + head
        of_model = weights * matrix.bits_per_weight / 8
        of_one = matrix.weights * matrix.bits_per_weight / 8
        return min(max(1, ceil(min(of_model, _TIMES_THE_CACHE * cache_bytes()) / of_one)), _MOST_COPIES)

    def _depths(self) -> tuple[int, int]:
        """Half of that many blocks and all of them leave nothing of the first in the caches; no more than there are."""
        blocks = self.space.model_map.blocks
        of_one = 4 * sum(site.outputs * site.inputs for site in blocks[0].structure.sites)
        many = min(max(2, ceil(2 * _TIMES_THE_CACHE * cache_bytes() / of_one)), max(2, len(blocks)))
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
    seconds: Seconds
    spread: float

    @classmethod
    def of(cls, speed: Speed, settings: LatencySettings) -> _Took:
        """Of a whole prefill and of one step."""
        tokens = settings.batch * settings.context
        seconds = Seconds(prefill=tokens / speed.prefill.median, decode=settings.batch / speed.decode.median)
        return cls(seconds, max(speed.prefill.spread, speed.decode.spread))


def cache_bytes(folder: Path = _CACHES) -> int:
    """Of the largest cache of a processor."""
    sizes = []
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=_USUAL_CACHE)


def _seconds(run: Callable[[], None], clock: Clock) -> float:
    """Median of as many runs as fill a short while, after one that warms up."""
    run()
    took: list[float] = []
    begun = time.perf_counter()
    while len(took) < _LEAST_RUNS or time.perf_counter() - begun < _LEAST_SECONDS:
        start = clock()
        run()
        took.append(clock() - start)
    return statistics.median(took)


def _product(matrix: Matrix, turns: Sequence[Seconds]) -> Product:
    phases = {phase: [getattr(turn, phase) for turn in turns] for phase in ("prefill", "decode")}
    middle = {phase: statistics.median(values) for phase, values in phases.items()}
    spread = max((max(values) - min(values)) / middle[phase] for phase, values in phases.items())
    return Product(
        outputs=matrix.outputs, inputs=matrix.inputs, form=matrix.form, seconds=Seconds(**middle), spread=spread
    )


def _scaled(seconds: Seconds, by: float) -> Seconds:
    return Seconds(prefill=by * seconds.prefill, decode=by * seconds.decode)


def _processor() -> str:
    """As it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
