"""Seconds of a plan are the sum of what its parts take; a table that lacks a part says which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from llmcompress.errors import CompressError
from llmcompress.model.probe import probe
from llmcompress.search.costs.forms import Forms, Matrix
from llmcompress.search.costs.latency_table import BlockRest, LatencyTable, Product, Seconds, shapes_of
from llmcompress.search.costs.measuring import LatencySettings, cache_bytes, measure_latency
from llmcompress.search.costs.seconds import seconds_of, wanted_matrices
from llmcompress.search.plan_space import Plan, PlanSpace
from llmcompress.search.space import Space

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=288,
    max_position_embeddings=64,
)
SPACE = {
    "sites": {"dense": [], "int4": [{"rtn": {"scheme": "int4_g16"}}]},
    "bodies": {"whole": [], "narrow": [{"width": {"fraction": 0.25, "heads": False}}]},
    "after": {"none": [], "rounded": [{"embeddings": {"embedding": "int8_channel"}}]},
    "most_dropped": 0.5,
}
WEIGHTS_PER_SECOND = 1e6


@pytest.fixture(scope="module")
def space() -> PlanSpace:
    return PlanSpace(Space.model_validate(SPACE), probe(CONFIG))


def _seconds(matrix: Matrix) -> Seconds:
    decode = matrix.weights * matrix.bits_per_weight / WEIGHTS_PER_SECOND
    return Seconds(prefill=8 * decode, decode=decode)


def _table(space: PlanSpace) -> LatencyTable:
    """Products take as long as their bits; a block's rest as long as it is wide."""
    forms = Forms(space)
    products, heads = (
        tuple(
            Product(outputs=m.outputs, inputs=m.inputs, form=m.form, seconds=_seconds(m), spread=0.0) for m in matrices
        )
        for matrices in wanted_matrices(space, forms)
    )
    shapes = {shapes_of(info): info for info in forms.blocks.values()}
    rests = tuple(
        BlockRest(shapes=text, seconds=Seconds(prefill=2.0, decode=float(info.structure.sites[-1].inputs)), spread=0.0)
        for text, info in shapes.items()
    )
    return LatencyTable(
        runtime="torch",
        by="microbenchmarks",
        versions={},
        device="cpu",
        processor="none",
        threads=1,
        clock="wall",
        batch=2,
        context=16,
        turns=1,
        products=products,
        heads=heads,
        blocks=rests,
        outside=Seconds(prefill=3.0, decode=5.0),
    )


def _one_by_one(space: PlanSpace, plan: Plan) -> float:
    """Seconds of a decode step, written out for a Llama."""
    bits = {"dense": 32, "int4": 4}
    total = 5.0 + (8 if space.chosen(plan)["after"] == "rounded" else 32) * 288 * 32 / WEIGHTS_PER_SECOND
    for index in space.bodies:
        body = space.units[index].options[plan[index]]
        if body == "dropped":
            continue
        ffn = {"whole": 48, "narrow": 36}[body]
        total += ffn
        for inside in space.inside(index):
            unit = space.units[inside]
            for site in unit.sites:
                rows = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": ffn, "up_proj": ffn}
                columns = ffn if site.endswith("down_proj") else 32
                weights = rows.get(site.rpartition(".")[2], 32) * columns
                total += weights * bits[unit.options[plan[inside]]] / WEIGHTS_PER_SECOND
    return total


def test_decode_is_the_sum_over_what_a_plan_has(space: PlanSpace) -> None:
    decode = seconds_of(space, _table(space))["decode"]
    for seed in range(10):
        plan = space.random(np.random.default_rng(seed))
        assert decode.total(space, plan) == pytest.approx(_one_by_one(space, plan) / 2)


def test_prefill_is_per_token_of_the_prompt(space: PlanSpace) -> None:
    table, plan = _table(space), space.uniform("dense")
    blocks = 3 * (2.0 + sum(_seconds(form.matrices[0]).prefill for form in _forms_of_a_block(space)))
    head = _seconds(Matrix(288, 32)).prefill
    found = seconds_of(space, table)["prefill"].total(space, plan)
    assert found == pytest.approx((3.0 + blocks + head) / (2 * 16))


def _forms_of_a_block(space: PlanSpace) -> list:
    forms = Forms(space)
    return [form for index in space.inside(space.bodies[0]) for form in forms.of(space.units[index], "whole", "dense")]


def test_a_table_is_read_as_it_was_written(space: PlanSpace, tmp_path: Path) -> None:
    table = _table(space)
    table.write(tmp_path / "table.json")
    assert LatencyTable.read(tmp_path / "table.json") == table


def test_a_table_that_lacks_a_part_says_which(space: PlanSpace) -> None:
    table = _table(space)
    short = table.model_copy(update={"products": tuple(row for row in table.products if row.form == "dense")})
    with pytest.raises(CompressError, match=r"does not have a product with a matrix of .* as int4_g16"):
        seconds_of(space, short)


def test_a_measured_table_has_all_that_a_plan_may_have(space: PlanSpace) -> None:
    settings = LatencySettings(context=8, new_tokens=3, turns=1)
    table = measure_latency(space, CONFIG, "torch", settings=settings)
    seconds = seconds_of(space, table)
    dropped = space.plan({f"{space.units[space.bodies[0]].name} (body)": "dropped"})
    for each in seconds.values():
        assert each.total(space, space.uniform("int4", body="narrow", after="rounded")) > 0
        assert each.total(space, dropped) == pytest.approx(each.total(space, space.uniform("dense")), rel=1)
    assert {row.form for row in table.products} == {"dense", "int4_g16"}


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_bytes(tmp_path) == 32 * 2**20
