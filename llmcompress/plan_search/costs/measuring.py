"""Measures a latency table on this device: products, one after the other, and small models in turns."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from llmcompress.evaluation.device.limits import device_name
from llmcompress.evaluation.device.pinning import pinned
from llmcompress.evaluation.device.speed import CLOCKS, Clock
from llmcompress.plan_search.costs.bench import BENCHES, Unmeasurable
from llmcompress.plan_search.costs.forms import Forms, Matrix
from llmcompress.plan_search.costs.latency_table import LatencyTable, Product, Seconds
from llmcompress.plan_search.costs.seconds import heads_of, wanted_matrices
from llmcompress.plan_search.costs.small_runs import TIMES_THE_CACHE, LatencySettings, SmallRuns, cache_bytes
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.progress import Progress, Silent

_MOST_COPIES = 1024
_LEAST_RUNS, _LEAST_SECONDS = 2, 0.04
"""Of one turn of one product."""


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
        runs = SmallRuns(space, config, bench, chosen, forms, progress)
        alone = _Products(runs)
        products = alone.of_linears() if bench.measures_products else runs.differences(wanted_matrices(space, forms)[0])
        heads = alone.of_heads() if bench.measures_products else runs.heads(heads_of(space))
        blocks, outside = runs.blocks({each.matrix: each for each in products})
        outside_bytes: int | None = None
        if chosen.memory:
            blocks, outside_bytes = runs.memory(blocks)
        power = runs.power() if chosen.power else None
        return LatencyTable(
            runtime=runtime,
            by="microbenchmarks" if bench.measures_products else "differences",
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
            outside_bytes=outside_bytes,
            power=power,
            not_measured=tuple(runs.missing),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )


@dataclass(frozen=True)
class _Products:
    """Measured alone, of all matrices that plans may have."""

    runs: SmallRuns

    def of_linears(self) -> tuple[Product, ...]:
        """Of all matrices that linears may become."""
        wanted, _ = wanted_matrices(self.runs.space, self.runs.forms)
        return self._timed(wanted, self.runs.settings.context, tied=False)

    def of_heads(self) -> tuple[Product, ...]:
        """Of all matrices that the output head may become, which are so large that what a product takes besides counts
        in memory too."""
        _, wanted = wanted_matrices(self.runs.space, self.runs.forms)
        tokens = self.runs.settings.context if self.runs.bench.head_sees_prompt else 1
        found = self._timed(wanted, tokens, tied=self.runs.space.model_map.tied)
        besides = self.runs.bench.transient_bytes
        return tuple(row.model_copy(update={"bytes": row.bytes + besides(row.matrix)}) for row in found)

    def _timed(self, wanted: Sequence[Matrix], prompt: int, *, tied: bool) -> tuple[Product, ...]:
        """In turns: of each product as many as fit into memory at once are measured, then the next one is."""
        took: dict[Matrix, list[Seconds]] = {}
        for turn in range(self.runs.settings.turns):
            for matrix in wanted:
                self.runs.progress.substep(f"turn {turn + 1}: {matrix.outputs}×{matrix.inputs} {matrix.form}")
                try:
                    found = self._one(matrix, prompt, tied=tied)
                except Unmeasurable as problem:
                    if not turn:
                        self.runs.leave_out(f"{matrix.outputs}×{matrix.inputs} {matrix.form}", str(problem))
                    continue
                took.setdefault(matrix, []).append(found)
        return tuple(_product(matrix, turns, self.runs.bench.held_bytes(matrix)) for matrix, turns in took.items())

    def _one(self, matrix: Matrix, prompt: int, *, tied: bool) -> Seconds:
        copies = self._copies(matrix)
        run_for = self.runs.bench.products(matrix, copies, tied=tied)
        clock, batch = CLOCKS[self.runs.settings.clock], self.runs.settings.batch
        return Seconds(
            prefill=_seconds(run_for(batch * prompt), clock) / copies, decode=_seconds(run_for(batch), clock) / copies
        )

    def _copies(self, matrix: Matrix) -> int:
        """As many weights as come between two uses of one in the model, or as the caches do not hold."""
        sites = [site for block in self.runs.space.model_map.blocks for site in block.structure.sites]
        weights = sum(site.outputs * site.inputs for site in sites) + self.runs.table_weights
        of_one = self.runs.bench.held_bytes(matrix)
        of_model = weights * of_one / matrix.weights
        return min(max(1, ceil(min(of_model, TIMES_THE_CACHE * cache_bytes()) / of_one)), _MOST_COPIES)


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


def _product(matrix: Matrix, turns: Sequence[Seconds], held: int) -> Product:
    phases = {phase: [getattr(turn, phase) for turn in turns] for phase in ("prefill", "decode")}
    middle = {phase: statistics.median(values) for phase, values in phases.items()}
    spread = max((max(values) - min(values)) / middle[phase] for phase, values in phases.items())
    return Product(
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        form=matrix.form,
        seconds=Seconds(**middle),
        spread=spread,
        bytes=held,
    )


def _processor() -> str:
    """As it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
