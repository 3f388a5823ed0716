"""A target that takes no negative scales: every quantizer knows it from the start, and nobody else notices."""

from __future__ import annotations

import pytest
import torch

from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import restore, round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.passes.base import PASSES, Pass
from llmcompress.passes.quantization.target_limits import within_limits
from llmcompress.recipe import parse_recipe
from tests.passes.decomposition.factored import compressed

POSITIVE = TargetLimits(positive_scales=True)

QUANTIZERS = [
    "{rtn: {scheme: int4_g16}}",
    "{rtn: {scheme: int4_g16, overrides: {'*.up_proj': {scheme: int3_channel, range: mse}}}}",
    "{gptq: {scheme: int4_g16}}",
    "{awq: {scheme: int4_g16}}",
    "{hqq: {scheme: int4_g16}}",
    "{learned_rounding: {scheme: int4_g16, steps: 3}}",
    "{scale_refinement: {scheme: int2_g16, quantizer: {rtn: {}}}}",
    "{error_propagation: {scheme: int4_g16}}",
    "{sparsegpt: {sparsity: 0.5, scheme: int4_g16}}",
    "{low_rank_correction: {quantizer: {rtn: {on_indivisible: pad}}, rank: 2, factor_scheme: int4_channel}}",
    "{caldera: {scheme: int2_g16, rank: 2, iterations: 1, factor_scheme: int4_channel}}",
    "{mixed_precision: {bits: 5.5, schemes: [int3_g16, int4_g16]}}",
    "{mixture_of_formats: {schemes: [int4_g16, fp4_g16]}}",
    "{embeddings: {embedding: int4_g16, head: int4_g16, tied: untie}}",
]


def read(text: str) -> Pass:
    return parse_recipe(f"passes: [{text}]", "test").passes[0]


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("group", [None, 16, 5])
def test_codes_under_positive_scales_stay_in_range_and_near(bits, group, search):
    scheme = named_scheme(f"int{bits}_{'channel' if group is None else f'g{group}'}").with_positive_scales()
    weight_OI = torch.randn(12, 37, generator=torch.Generator().manual_seed(bits))
    fitted = fit(weight_OI, scheme.weights, search=search)
    codes_OI = round_to_codes(weight_OI, fitted)
    assert (fitted.scale_OG > 0).all()
    assert codes_OI.min() >= scheme.weights.low and codes_OI.max() <= scheme.weights.high
    if search == "minmax":
        # the whole range is covered, so no weight lies farther than half a step from its code
        scale_OI = fitted.scale_OG.repeat_interleave(group or 37, 1)[:, :37]
        assert ((restore(codes_OI, fitted) - weight_OI).abs() <= scale_OI / 2 * 1.0001).all()


@pytest.mark.parametrize("text", QUANTIZERS)
def test_no_quantizer_makes_a_negative_scale_for_a_target_that_takes_none(text):
    scales = {}
    for name, each in (("any", read(text)), ("positive", within_limits(read(text), POSITIVE))):
        model, _ = compressed("llama_gqa", each)
        found = [tensor.flatten() for key, tensor in model.state_dict().items() if key.endswith("scale_OG")]
        scales[name] = torch.cat(found)
    assert (scales["any"] < 0).any(), "otherwise this shows nothing"
    assert len(scales["positive"]) and (scales["positive"] > 0).all()


@pytest.mark.parametrize("text", QUANTIZERS)
def test_a_target_without_limits_leaves_a_pass_as_it_is(text):
    assert within_limits(read(text), TargetLimits()) == read(text)


def test_what_has_no_scheme_or_no_negative_scales_is_left_as_it_is():
    for text in ("{wanda: {sparsity: 0.5}}", "{rtn: {scheme: int8_channel}}", "{gptq: {scheme: int4_g16_asym}}"):
        assert within_limits(read(text), POSITIVE) == read(text)


def _has_defaults(name: str) -> bool:
    return not any(field.is_required() for field in PASSES[name].model_fields.values())


@pytest.mark.parametrize("name", sorted(filter(_has_defaults, PASSES)))
def test_every_pass_can_be_aimed_twice(name):
    each = PASSES[name]()
    once = within_limits(each, POSITIVE)
    assert type(once) is type(each) and within_limits(once, POSITIVE) == once
