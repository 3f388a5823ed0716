"""A table of losses: it comes back from a file as it was, and allocations read it."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.sensitivity.allocation import bits_of, by_slopes, least_and_most_bits, least_loss
from llmcompress.sensitivity.table import LossTable, Row


def table(seed: int = 0, units: int = 4) -> LossTable:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for unit in range(units):
        losses = torch.rand(3, generator=generator, dtype=torch.float64).sort(descending=True).values
        bits = torch.randint(1, 9, (3,), generator=generator).cumsum(0).tolist()
        rows.append(Row.of(f"unit {unit}", ["low", "middle", "high"], losses, bits, [(4, 8)] * 3))
    return LossTable(tuple(rows))


def losses_of(found: LossTable, chosen: dict[str, int]) -> float:
    return sum(float(row.loss_C[chosen[row.unit]]) for row in found.rows)


def test_a_table_comes_back_from_its_file_bit_for_bit(tmp_path: Path) -> None:
    here = table()
    save_file(here.tensors(), tmp_path / "table.safetensors")
    (tmp_path / "table.json").write_text(json.dumps(here.about()))
    again = LossTable.read(load_file(tmp_path / "table.safetensors"), json.loads((tmp_path / "table.json").read_text()))
    assert again.units == here.units and [row.options for row in again.rows] == [row.options for row in here.rows]
    ours, theirs = here.tensors(), again.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_losses_are_kept_in_double_precision_and_bytes_are_whole() -> None:
    row = Row.of("a", ["x"], [0.1], [9], [(3, 3)])
    assert row.loss_C.dtype == torch.float64 and float(row.loss_C) == 0.1
    assert row.bytes_C.tolist() == [2]


@pytest.mark.parametrize("seed", range(8))
def test_the_least_loss_within_the_budget_is_that_of_all_combinations(seed: int) -> None:
    here = table(seed)
    least, most = least_and_most_bits(here)
    budget = (least + most) // 2
    tried = [dict(zip(here.units, each, strict=True)) for each in product(range(3), repeat=4)]
    best = min(losses_of(here, each) for each in tried if bits_of(here, each) <= budget)
    exact, quick = least_loss(here, budget), by_slopes(here, budget)
    assert bits_of(here, exact) <= budget and losses_of(here, exact) == pytest.approx(best, abs=1e-12)
    assert bits_of(here, quick) <= budget and losses_of(here, quick) >= best - 1e-12


def test_units_that_must_agree_become_one_row_of_sums() -> None:
    here = table()
    joined = here.together([("unit 0", "unit 2"), ("unit 1",)])
    assert joined.units == ("unit 0", "unit 1")
    row = joined["unit 0"]
    torch.testing.assert_close(row.loss_C, here["unit 0"].loss_C + here["unit 2"].loss_C)
    assert row.bits_C.tolist() == (here["unit 0"].bits_C + here["unit 2"].bits_C).tolist()
    assert row.shape_CD.tolist() == [[4, 8, 4, 8]] * 3


def test_no_larger_option_counts_as_worse() -> None:
    row = Row.of("a", ["x", "y", "z"], [3.0, 4.0, 1.0], [1, 2, 3], [(1, 1)] * 3).rising()
    assert row.loss_C.tolist() == [3.0, 3.0, 1.0]
