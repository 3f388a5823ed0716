"""Processes that share the windows, played by threads: what must be added up is, before anything is decided with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.process_group import ProcessGroup
from llmcompress.numerics.statistics import Pool, Sketch
from llmcompress.passes.apply import apply_passes
from tests.families import tiny_model
from tests.passes.test_laws import make, map_of, windows

PROCESSES = 2


@dataclass
class Meeting:
    """Where threads lay down what they have and wait for the others."""

    brought: list[Tensor] = field(default_factory=lambda: [torch.empty(0)] * PROCESSES)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(PROCESSES, timeout=60))


@dataclass(frozen=True)
class Played(ProcessGroup):
    """One of the threads. Nobody is given the first one's weights: what is not shared shows."""

    meeting: Meeting = field(default_factory=Meeting)

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        self._all(tensor, lambda brought: brought.sum(0))

    def all_reduce_max_(self, tensor: Tensor) -> None:
        self._all(tensor, lambda brought: brought.amax(0))

    def broadcast_tensors(self, module: nn.Module) -> None:
        pass

    def _all(self, tensor: Tensor, how: Callable[[Tensor], Tensor]) -> None:
        self.meeting.brought[self.index] = tensor.clone()
        self.meeting.barrier.wait()
        found = how(torch.stack(self.meeting.brought))
        self.meeting.barrier.wait()
        tensor.copy_(found)


def in_each(do: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What every thread returns; one that fails wakes the others."""
    meeting = Meeting()

    def play(index: int) -> Any:
        try:
            return do(Played(index, PROCESSES, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(play, range(PROCESSES)))


PASSES: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"scheme": "int3_g32_asym"}),
    ("awq", {"scheme": "int3_g32_asym"}),
    ("smoothquant", {"strength": 0.5}),
    ("error_propagation", {"scheme": "int3_g32_asym"}),
    ("learned_rounding", {"scheme": "int2_g32", "steps": 6}),
    ("gsq", {"scheme": "int2_g32", "steps": 6}),
    ("efficient_qat", {"scheme": "int2_g32", "steps": 6}),
    ("wanda", {"sparsity": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), PASSES, ids=str)
def test_all_processes_come_to_the_same_weights_by_themselves(name: str, options: dict[str, Any]) -> None:
    map_of("llama_gqa", tiny_model("llama_gqa", seed=1))

    def compressed(processes: ProcessGroup) -> dict[str, Tensor]:
        model = tiny_model("llama_gqa", seed=1)
        context = RunContext(windows(), batch=1, processes=processes)
        found = apply_passes(model, map_of("llama_gqa", model), (make(name, options),), context)
        return dict(found.model.state_dict())

    first, second = in_each(compressed)
    before = tiny_model("llama_gqa", seed=1).state_dict()
    assert any(key not in before or not torch.equal(tensor, before[key]) for key, tensor in first.items())
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def test_a_pooled_sketch_estimates_the_errors_of_all_tokens_even_where_all_saw_the_same() -> None:
    """All draw the same signs for their tokens: as they are, equal tokens would count four times, not twice."""
    x_TI = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    difference_OI = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))

    def pooled(pool: Pool) -> float:
        sketch = Sketch(16, torch.device("cpu"))
        sketch.add(x_TI)
        sketch.pool(pool)
        return sketch.output_error(difference_OI)

    exact = PROCESSES * float((x_TI @ difference_OI.T).square().sum())
    for found in in_each(pooled):
        assert found == pytest.approx(exact, rel=0.3)
