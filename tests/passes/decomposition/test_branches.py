"""Codes with a low-rank branch: never worse than the codes alone, at the bits that the row tells."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmcompress.errors import CompressError
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.quant_linear import QuantLinear
from tests.families import FAMILIES, tiny_model
from tests.passes.decomposition.factored import block_pass, compressed, logits, map_of

CODES = {"scheme": "int2_g32", "on_indivisible": "pad"}
FEW = ("*.0.mlp.*", "*.0.self_attn.k_proj")
"""Sites of the first block of a Llama; each is a search, so tests that need no others leave them out."""


def correction(quantizer: str = "gptq", **options: Any) -> Any:
    return block_pass("low_rank_correction", **{"quantizer": {quantizer: CODES}, "rank": 4, **options})


def caldera(**options: Any) -> Any:
    return block_pass("caldera", **{**CODES, "rank": 4, "iterations": 1, **options})


PASSES = {
    "caldera": caldera(sites=FEW),
    "caldera, int8 factors": caldera(sites=FEW, factor_scheme="int8_channel"),
    "eora": correction(sites=FEW),
    "eora of rtn": correction("rtn", sites=FEW),
    "lqer": correction(sites=FEW, whitening="activation"),
    "eora, int4 factors": correction(sites=FEW, factor_scheme="int4_g32"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [caldera, correction])
def test_on_every_family_a_branch_loses_less_than_the_codes_alone(family: str, make: Any) -> None:
    first = map_of(family).blocks[0]
    model, rows = compressed(family, make(sites=f"{first.name}.*"))
    assert {row.site for row in rows} == {first.full(site.name) for site in first.structure.sites}
    for row in rows:
        if not row.tokens:
            continue
        assert isinstance(model.get_submodule(row.site), CorrectedLinear)
        assert row.error is not None and row.error_before is not None
        assert row.error < row.error_before, row
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("name", PASSES)
def test_errors_told_are_never_above_those_of_the_codes_and_runs_repeat(name: str) -> None:
    (model, rows), (again, rows_again) = (compressed("llama_gqa", PASSES[name]) for _ in range(2))
    assert rows == rows_again
    assert torch.equal(logits(model), logits(again))
    if name != "lqer" and "int4" not in name:
        assert all(row.error <= row.error_before for row in rows if row.error is not None and row.error_before)


@pytest.mark.parametrize("name", PASSES)
def test_bits_are_those_of_the_tensors_that_are_stored(name: str) -> None:
    model, rows = compressed("llama_gqa", PASSES[name], dtype=torch.bfloat16)
    for row in rows:
        module = model.get_submodule(row.site)
        if not isinstance(module, CorrectedLinear):
            continue
        bits = 0.0
        for part in (module.base, module.right, module.left):
            if isinstance(part, QuantLinear):
                bits += part.codes_OI.numel() * part.scheme.weights.bits + part.scale_OG.numel() * 16
            else:
                bits += part.weight.numel() * 16
        assert row.bits_per_weight == pytest.approx(bits / (module.out_features * module.in_features))


def test_rank_zero_is_gptq() -> None:
    model, rows = compressed("llama_gqa", caldera(rank=0, sites=FEW))
    base, base_rows = compressed("llama_gqa", block_pass("gptq", **CODES, sites=FEW))
    assert torch.equal(logits(model), logits(base))
    assert [row.bits_per_weight for row in rows] == [row.bits_per_weight for row in base_rows]
    assert {row.algorithm for row in rows} == {"caldera"}


def test_more_turns_never_lose_more() -> None:
    errors = []
    for iterations in (1, 2, 5):
        _, rows = compressed("llama_gqa", caldera(iterations=iterations, sites=FEW))
        errors.append([row.error for row in rows])
    for fewer, more in pairwise(errors):
        assert all(b <= a for a, b in zip(fewer, more, strict=True))
    assert errors[-1] != errors[0]


def test_a_branch_of_full_rank_repairs_everything() -> None:
    dense = logits(tiny_model("llama", seed=1))
    model, _ = compressed("llama", correction(rank=1000))
    torch.testing.assert_close(logits(model), dense, atol=2e-4 * float(dense.abs().max()), rtol=0)


def test_the_codes_are_those_of_the_quantizer_alone() -> None:
    only_first = {"sites": "*.layers.0.*"}
    model, _ = compressed("llama_gqa", correction(**only_first))
    alone, _ = compressed("llama_gqa", block_pass("gptq", **CODES, **only_first))
    for site in map_of("llama_gqa").blocks[0].structure.sites:
        name = map_of("llama_gqa").blocks[0].full(site.name)
        assert torch.equal(model.get_submodule(name).base.codes_OI, alone.get_submodule(name).codes_OI)


def test_overrides_choose_another_quantizer_and_another_rank() -> None:
    mixed = correction(overrides={"*.down_proj": {"quantizer": {"rtn": {"scheme": "int8_channel"}}, "rank": 2}})
    model, rows = compressed("llama", mixed)
    found = {row.site.rpartition(".")[2]: (row.scheme, row.rank) for row in rows}
    assert found["down_proj"] == ("int8_channel", 2) and found["q_proj"] == ("int2_g32", 4)
    assert model.model.layers[0].mlp.down_proj.base.scheme.name == "int8_channel"


def test_scales_folded_before_and_quantizers_inside_work_together() -> None:
    scales = block_pass("awq", **CODES, round=False)
    model, rows = compressed("llama_gqa", scales, correction())
    assert all(row.error < row.error_before for row in rows if row.algorithm == "low_rank_correction")
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantizer": {}}, "exactly one"),
        ({"quantizer": {"svd": {}}}, "'svd' is none"),
        ({"quantizer": {"awq": {}}}, "round: false"),
        ({"quantizer": {"caldera": {}}}, "use one of bias_correction, gptq, hqq, rtn"),
        ({"quantizer": {"gptq": {"sites": "*"}}}, "cannot be set in `quantizer`"),
        ({"quantizer": {"gptq": {"true_sequential": True}}}, "cannot be set in `quantizer`"),
        ({"quantizer": {"gptq": {"scheme": "int4_g32", "damping": 7}}}, "damping"),
        ({"factor_scheme": "int8_channel_a8token"}, "weight-only"),
        ({"rank": 0}, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        block_pass("low_rank_correction", **options)


@pytest.mark.parametrize("options", [{"scheme": "int9_g3"}, {"factor_scheme": "int9"}], ids=str)
def test_unknown_schemes_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="not a quantization scheme"):
        block_pass("caldera", **options)


def test_sites_that_do_not_divide_are_refused_before_any_work() -> None:
    indivisible = {"scheme": "int2_g40"}
    for each in (
        block_pass("caldera", **indivisible),
        block_pass("low_rank_correction", quantizer={"gptq": indivisible}),
    ):
        with pytest.raises(CompressError, match="do not divide"):
            each.check(map_of("llama_gqa"))


def test_bfloat16_branches_survive_storage_unchanged() -> None:
    for each in PASSES.values():
        model, _ = compressed("llama_gqa", each, dtype=torch.bfloat16)
        for key, tensor in model.model.layers.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, tensor.bfloat16().float()), key
