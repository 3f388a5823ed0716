"""Benches of runtimes: graphs of products compute products, and small models are those that differences need."""

from __future__ import annotations

import pytest
import torch

from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.quant_linear import QuantLinear, quantized_linears
from llmcompress.plan_search.costs.bench import BENCHES, Unmeasurable, byte_tokenizer
from llmcompress.plan_search.costs.forms import Forms, Matrix
from llmcompress.plan_search.costs.measuring import measure_latency
from llmcompress.plan_search.costs.small_models import plan_model, small_model, with_matrix
from llmcompress.plan_search.costs.small_runs import LatencySettings
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.space import Space
from tests.search.costs.latency_tables import CONFIG, small_space

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["dense", "int8_channel", "int4_g16", "int4_g16_asym"])
def test_onnxruntime_computes_so_many_products_of_any_number_of_tokens(form: str, tied: bool) -> None:
    run_for = BENCHES["onnxruntime"](CPU, torch.float32).products(Matrix(48, 32, form), 3, tied=tied)
    for tokens in (1, 5):
        run_for(tokens)()


def test_a_form_without_an_operator_is_said_to_have_none() -> None:
    with pytest.raises(Unmeasurable, match="fp8"):
        BENCHES["onnxruntime"](CPU, torch.float32).products(Matrix(48, 32, "fp8_channel"), 1)


def test_what_a_runtime_holds_of_codes_is_what_its_modules_hold() -> None:
    bench = BENCHES["torch"](CPU, torch.float32)
    made = QuantLinear.from_spec({"scheme": "int4_g16", "outputs": 48, "inputs": 32, "bias": False}, torch.float32)
    assert bench.held_bytes(Matrix(48, 32, "int4_g16")) == 48 * 32 + 4 * made.scale_OG.numel()
    assert bench.held_bytes(Matrix(48, 32)) == 4 * 48 * 32


def test_small_models_differ_in_depth_body_and_form() -> None:
    space = small_space()
    narrow = small_model(CONFIG, 2, space.space.bodies["narrow"])
    assert [block.mlp.down_proj.weight.shape for _, block in find_blocks(narrow)] == [(32, 48)] * 2
    coded = with_matrix(small_model(CONFIG, 2, ()), Matrix(64, 32, "int4_g16"))
    assert {name.rpartition(".")[2] for name in quantized_linears(coded)} == {"gate_proj", "up_proj"}


def test_the_model_of_a_plan_has_its_shapes_and_forms() -> None:
    space = small_space()
    last = space.bodies[-1]
    names = {index: space.units[index].name for index in space.bodies}
    plan = space.plan(
        {f"{names[space.bodies[0]]} (body)": "dropped", f"{names[last]} (body)": "narrow"}
        | {space.units[index].name: "int4" for index in space.inside(last)}
        | {"after": "rounded"}
    )
    model = plan_model(CONFIG, space, Forms(space), plan)
    blocks = [block for _, block in find_blocks(model)]
    assert [block.mlp.down_proj.in_features for block in blocks] == [64, 48]
    assert len(quantized_linears(blocks[0])) == 0 and len(quantized_linears(blocks[1])) == 7
    assert len(quantized_linears(model)) == 7 + 2
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_llama_cpp_is_measured_by_differences() -> None:
    sites = {name: [{"rtn": {"scheme": name}}] for name in ("int4_g32", "int4_g16")}
    space = PlanSpace(Space.model_validate({"sites": {"dense": [], **sites}}), small_space().model_map)
    settings = LatencySettings(context=8, new_tokens=3, turns=1, memory=False, power=False)
    table = measure_latency(space, CONFIG, "llama_cpp", settings=settings)
    assert table.by == "differences"
    assert {row.form for row in table.products} == {"dense", "int4_g32"}
    assert all(row.seconds.decode == 0 for row in table.products if row.form == "dense")
    assert any("int4_g16" in each for each in table.not_measured)


def test_a_byte_tokenizer_reads_any_text() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer("Grüße, 世界")["input_ids"]) == "Grüße, 世界"
