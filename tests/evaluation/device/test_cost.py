"""One record per model, runtime, batch size and context, complete and in turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.device import cost as module
from llmcompress.evaluation.device import limits
from llmcompress.evaluation.device.cost import Candidate, CostSettings, CostTable, as_candidates, measure_costs
from llmcompress.evaluation.device.peak_memory import MemoryRequest
from llmcompress.records.cost import Cost, MachineLimits, Memory
from llmcompress.records.measurements import Measurement
from tests.tiny_folder import write_tiny_llama
from tests.tiny_text import tiny_llama

CPU = torch.device("cpu")
QUICK = CostSettings(batches=(2, 1), contexts=(8, 4), new_tokens=3, repeats=2, skip=("energy", "limits"))


@pytest.fixture
def memory_requests(monkeypatch: pytest.MonkeyPatch) -> list[MemoryRequest]:
    """What is asked of fresh processes; each row gets its number."""
    asked: list[MemoryRequest] = []

    def answer(request: MemoryRequest) -> list[Memory]:
        asked.append(request)
        return [Memory(instrument="fake", running=number) for number, _ in enumerate(request.settings)]

    monkeypatch.setattr(module, "peak_memory", answer)
    return asked


def test_every_batch_size_with_every_context_is_a_row_per_model(
    tmp_path: Path, memory_requests: list[MemoryRequest]
) -> None:
    folder = str(write_tiny_llama(tmp_path / "model"))
    table = measure_costs({"a": Candidate(folder, of="dense"), "b": Candidate(folder)}, device=CPU, settings=QUICK)
    settings = [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert [(row.model, row.setting) for row in table.rows] == [(name, each) for each in settings for name in "ab"]
    assert {(row.model, row.of) for row in table.rows} == {("a", "dense"), ("b", "model")}
    assert [request.settings for request in memory_requests] == [tuple(settings)] * 2
    assert [row.memory.running for row in table.rows if row.model == "b"] == [0, 1, 2, 3]
    first, last = table.rows[0], table.rows[-1]
    assert (first.runtime, first.dtype, first.device, first.new_tokens) == ("torch", "float32", "cpu", 3)
    assert first.bytes_on_disk == (Path(folder) / "model.safetensors").stat().st_size
    assert first.traffic and last.traffic and last.traffic.cache_bytes == 4 * first.traffic.cache_bytes
    assert first.traffic.bandwidth_fraction is None and first.energy.unavailable == "not asked for"
    assert len(table.ratios("a")) == 4 and all(row.model == "b" for row, _, _ in table.ratios("a"))


def test_fractions_are_what_was_moved_and_computed_by_what_the_machine_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = MachineLimits(device="cpu", threads=1, dtype="float32", bytes_per_second=1e9, flops_per_second=1e10)
    monkeypatch.setattr(module, "machine_limits", lambda *given: reached)
    settings = CostSettings(batches=(2,), contexts=(8,), new_tokens=3, repeats=1, skip=("energy",))
    table = measure_costs({"m": Candidate(tiny_llama())}, device=CPU, settings=settings)
    (row,), traffic = table.rows, table.rows[0].traffic
    assert traffic and table.limits == (reached,)
    steps, prefills = row.speed.decode.median / 2, row.speed.prefill.median / 16
    assert traffic.bandwidth_fraction == pytest.approx((traffic.weight_bytes + traffic.cache_bytes) * steps / 1e9)
    assert traffic.matrix_rate_fraction == pytest.approx(traffic.prefill_flops * prefills / 1e10)


def test_a_live_model_is_measured_as_it_is_and_without_what_only_files_have(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().to(torch.bfloat16).train()
    settings = CostSettings(contexts=(4,), new_tokens=2, repeats=1, skip=("energy", "limits"))
    (row,) = measure_costs({"live": Candidate(model)}, device=CPU, settings=settings).rows
    assert (row.dtype, row.bytes_on_disk) == ("bfloat16", None) and model.training
    assert row.memory.running is None and "save it" in (row.memory.unavailable or "")


def test_rows_and_limits_are_measurements_of_a_report(memory_requests: list[MemoryRequest], tmp_path: Path) -> None:
    folder = str(write_tiny_llama(tmp_path / "model"))
    monkey = CostSettings(contexts=(4,), new_tokens=2, repeats=1, skip=("energy", "limits"))
    (row,) = measure_costs({"m": Candidate(folder)}, device=CPU, settings=monkey).rows
    reader = TypeAdapter[Measurement](Measurement)
    assert reader.validate_json(reader.dump_json(row)) == row and isinstance(row, Cost)
    reached = MachineLimits(device="cpu", threads=1, dtype="float32", bytes_per_second=1.0, flops_per_second=1.0)
    assert reader.validate_json(reader.dump_json(reached)) == reached


def test_energy_is_read_around_the_model_or_its_absence_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = str(tmp_path)
    find = module.find_instrument
    monkeypatch.setattr(module, "find_instrument", lambda device: find(device, sysfs=tmp_path))
    settings = CostSettings(contexts=(4,), new_tokens=2, repeats=1, skip=("memory", "limits"))
    (row,) = measure_costs({"m": Candidate(tiny_llama())}, device=CPU, settings=settings).rows
    assert row.energy.instrument is None and missing in (row.energy.unavailable or "")


def test_a_context_beyond_the_models_positions_is_refused_before_anything_is_timed() -> None:
    with pytest.raises(CompressError) as told:
        measure_costs(
            {"tiny": Candidate(tiny_llama())}, device=CPU, settings=CostSettings(contexts=(4096,), skip=("limits",))
        )
    assert told.value.code == "speed.context" and told.value.where == "tiny"
    assert told.value.exit_code == ExitCode.USAGE


def test_models_are_named_once_and_with_their_runtime_where_that_is_what_differs() -> None:
    pairs = [("a", "a"), ("b", "b"), ("a", "a")]
    assert list(as_candidates(pairs, ["torch"])) == ["a", "b"]
    found = as_candidates(pairs, ["torch", "torch", "other"])
    assert list(found) == ["a (torch)", "b", "a (other)"]
    assert found["a (other)"] == Candidate("a", "other")
    with pytest.raises(CompressError, match="3 models, but 2 runners"):
        as_candidates(pairs, ["torch", "other"])


def test_limits_of_a_table_without_them_are_none() -> None:
    assert CostTable(()).limits == () and limits.device_name(CPU) == "cpu"
