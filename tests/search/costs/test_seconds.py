"""Seconds, memory and energy of a plan are sums of what its parts take; a table that lacks a part says which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmcompress.errors import CompressError
from llmcompress.plan_search.costs.checking import check_sums
from llmcompress.plan_search.costs.forms import Form, Forms, Matrix
from llmcompress.plan_search.costs.latency_table import Check, LatencyTable, Power, Seconds, read_tables, write_tables
from llmcompress.plan_search.costs.learned import corrected
from llmcompress.plan_search.costs.measuring import measure_latency
from llmcompress.plan_search.costs.resources import energy_of, memory_of
from llmcompress.plan_search.costs.seconds import seconds_of
from llmcompress.plan_search.costs.small_runs import LatencySettings, cache_bytes
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from tests.search.costs.latency_tables import CONFIG, seconds_of_bits, small_space, table_of


@pytest.fixture(scope="module")
def space() -> PlanSpace:
    return small_space()


def _plans(space: PlanSpace, count: int) -> list[Plan]:
    return [space.random(np.random.default_rng(seed)) for seed in range(count)]


def _parts(space: PlanSpace, plan: Plan) -> tuple[list[int], list[Matrix], Matrix]:
    """Widths of the blocks that stay, matrices of their linears, and the head, written out for a Llama."""
    chosen = space.chosen(plan)
    head = Matrix(288, 32, "int8_channel" if chosen["after"] == "rounded" else "dense")
    widths, matrices = [], []
    for index in space.bodies:
        body = space.units[index].options[plan[index]]
        if body == "dropped":
            continue
        width = {"whole": 64, "narrow": 48}[body]
        widths.append(width)
        shapes = {"k_proj": (16, 32), "v_proj": (16, 32), "gate_proj": (width, 32), "up_proj": (width, 32)}
        shapes["down_proj"] = (32, width)
        for inside in space.inside(index):
            unit = space.units[inside]
            form = {"dense": "dense", "int4": "int4_g16"}[unit.options[plan[inside]]]
            matrices += [Matrix(*shapes.get(site.rpartition(".")[2], (32, 32)), form) for site in unit.sites]
    return widths, matrices, head


def test_seconds_are_sums_over_what_a_plan_has(space: PlanSpace) -> None:
    found = seconds_of(space, table_of(space))
    for plan in _plans(space, 10):
        widths, matrices, head = _parts(space, plan)
        decode = sum(seconds_of_bits(each).decode for each in [*matrices, head])
        prefill = sum(seconds_of_bits(each).prefill for each in [*matrices, head])
        assert found["decode"].total(space, plan) == pytest.approx((5.0 + sum(widths) + decode) / 2)
        assert found["prefill"].total(space, plan) == pytest.approx((3.0 + 2.0 * len(widths) + prefill) / (2 * 16))


def test_memory_is_a_sum_and_energy_is_power_times_seconds(space: PlanSpace) -> None:
    table = table_of(space)
    memory = memory_of(space, table)
    powered = table.model_copy(update={"power": Power(instrument="a counter", prefill=30.0, decode=20.0)})
    energy, decode = energy_of(space, powered), seconds_of(space, table)["decode"]
    assert memory is not None and energy is not None
    for plan in _plans(space, 5):
        widths, matrices, head = _parts(space, plan)
        held = sum(table.product(each).bytes for each in matrices) + table.head(head).bytes
        assert memory.total(space, plan) == pytest.approx(1000 + sum(widths) + held)
        assert energy.total(space, plan) == pytest.approx(20.0 * decode.total(space, plan))


def test_what_was_not_measured_is_absent(space: PlanSpace) -> None:
    table = table_of(space).model_copy(update={"outside_bytes": None})
    assert memory_of(space, table) is None
    assert energy_of(space, table) is None


def test_two_factors_take_as_long_as_both(space: PlanSpace) -> None:
    table = table_of(space)
    site = space.model_map.blocks[0].structure.site("self_attn.q_proj")
    name = space.model_map.blocks[0].full(site.name)
    both = (Matrix(16, 32), Matrix(32, 32, "int4_g16"))
    forms = Forms(space, {("whole", "int4", name): Form(site, name, both)})
    plan = space.plan({name: "int4"})
    without = seconds_of(space, table)["decode"].total(space, plan)
    more = seconds_of_bits(both[0]).decode / 2
    assert seconds_of(space, table, forms=forms)["decode"].total(space, plan) == pytest.approx(without + more)


def test_a_correction_learns_how_much_slower_codes_are_together(space: PlanSpace) -> None:
    table, plans = table_of(space), _plans(space, 12)
    slower = table.model_copy(
        update={
            "products": tuple(
                row.model_copy(update={"seconds": row.seconds.plus(row.seconds, 0.8 * (row.form != "dense"))})
                for row in table.products
            ),
            "blocks": tuple(
                row.model_copy(update={"seconds": row.seconds.plus(row.seconds, 0.3)}) for row in table.blocks
            ),
        }
    )
    truth = seconds_of(space, slower)
    checks = [
        Check(
            model=str(number),
            summed=Seconds(prefill=0.0, decode=0.0),
            measured=Seconds(
                prefill=32 * truth["prefill"].total(space, plan), decode=2 * truth["decode"].total(space, plan)
            ),
            spread=0.0,
        )
        for number, plan in enumerate(plans)
    ]
    learned = corrected(space, table, plans, checks)
    unseen = space.uniform("int4", body="narrow")
    for phase, each in seconds_of(space, learned.table).items():
        assert learned.error_left_out[phase] < learned.error_before[phase] / 4
        assert each.total(space, unseen) == pytest.approx(truth[phase].total(space, unseen), rel=0.02)


def test_tables_are_read_as_they_were_written(space: PlanSpace, tmp_path: Path) -> None:
    tables = {name: table_of(space).model_copy(update={"runtime": name}) for name in ("torch", "onnxruntime")}
    write_tables(tmp_path / "table.json", tables.values())
    assert read_tables(tmp_path / "table.json") == tables
    assert LatencyTable.read(tmp_path / "table.json", runtime="torch") == tables["torch"]
    with pytest.raises(CompressError, match="tables of torch, onnxruntime, and not one of openvino"):
        LatencyTable.read(tmp_path / "table.json", runtime="openvino")
    tables["torch"].write(tmp_path / "torch.json")
    assert LatencyTable.read(tmp_path / "torch.json") == tables["torch"]


def test_a_file_without_tables_says_so(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(CompressError, match="holds no latency tables"):
        read_tables(tmp_path / "table.json")


def test_a_table_that_lacks_a_part_says_which(space: PlanSpace) -> None:
    table = table_of(space)
    short = table.model_copy(update={"products": tuple(row for row in table.products if row.form == "dense")})
    with pytest.raises(CompressError, match=r"does not have a product with a matrix of .* as int4_g16"):
        seconds_of(space, short)


def test_a_measured_table_has_all_that_a_plan_may_have(space: PlanSpace) -> None:
    settings = LatencySettings(context=8, new_tokens=3, turns=1, memory=False, power=False)
    table = measure_latency(space, CONFIG, "torch", settings=settings)
    assert seconds_of(space, table)["decode"].total(space, space.uniform("int4", body="narrow", after="rounded")) > 0
    assert {row.form for row in table.products} == {"dense", "int4_g16"}
    plan = space.random(np.random.default_rng(1))
    (check,) = check_sums(space, CONFIG, table, [("random", plan)], settings=settings)
    assert check.measured.decode > 0
    assert check.summed.decode == pytest.approx(seconds_of(space, table)["decode"].total(space, plan))


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_bytes(tmp_path) == 32 * 2**20
