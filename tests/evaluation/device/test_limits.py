"""The limits of the machine are what kernels move and compute by the clock, the fastest repeat of each."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmcompress.evaluation.device import limits
from llmcompress.evaluation.device.limits import bandwidth, fastest, matrix_rate
from llmcompress.records.cost import MachineLimits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SECONDS", 0.0)


def ticking():
    return itertools.count().__next__


def test_the_fastest_repeat_counts_and_the_warm_up_does_not() -> None:
    # begin and end of each repeat: 1, 9, 4, 6 seconds
    times = iter([0, 1, 1, 10, 10, 14, 14, 20])
    assert fastest(lambda: torch.zeros(1), CPU, lambda: float(next(times))) == 4.0


def test_bandwidth_is_that_of_the_kernel_that_moves_most() -> None:
    assert bandwidth(CPU, 4096, ticking()) == 3 * 4096, "by a clock that gives every kernel a second: the triad's"


def test_a_matrix_product_counts_two_operations_per_multiply_add() -> None:
    assert matrix_rate(CPU, torch.float32, 8, ticking()) == 2 * 8**3


def test_limits_are_measured_once_per_process_and_survive_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_ARRAY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(limits, "_SIDE", {"cpu": 32})
    first = limits.machine_limits(CPU, torch.float32, 77)
    assert limits.machine_limits(CPU, torch.float32, 77) is first
    assert (first.device, first.dtype, first.threads) == ("cpu", "float32", 77) and first.bytes_per_second > 0
    assert MachineLimits.model_validate_json(first.model_dump_json()) == first
