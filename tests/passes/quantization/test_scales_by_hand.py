"""Scales folded and ranges clipped are those that the formulas give, put together by hand for one block."""

from __future__ import annotations

import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream, BlockWork
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import restore, round_to_codes, row_errors
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.statistics import AbsMax, Gram, Statistic
from tests.families import tiny_model
from tests.passes.test_laws import compressed, make, map_of, windows

FAMILY = "llama_gqa"


def measured_first_block(kind: type[Statistic]) -> BlockWork:
    model = tiny_model(FAMILY, seed=1)
    block = next(iter(BlockStream(model, map_of(FAMILY, model), RunContext(windows(), batch=4))))
    block.measure(block.sites, (kind,))
    return block


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_smoothquant_divides_a_norm_by_the_largest_inputs_over_the_largest_weights(strength: float) -> None:
    only = ("*.layers.0.self_attn.[qkv]_proj",)
    model, _ = compressed(FAMILY, make("smoothquant", {"strength": strength, "sites": only}))
    block = measured_first_block(AbsMax)
    readers = [block.site(f"self_attn.{name}_proj") for name in "qkv"]
    weight_max = torch.cat([site.weight_OI for site in readers]).abs().amax(0)
    factors = readers[0].statistic(AbsMax).max_I ** strength / weight_max ** (1 - strength)
    before = block.module.get_parameter("input_layernorm.weight")
    torch.testing.assert_close(model.model.layers[0].input_layernorm.weight, before / factors)


def test_awq_clips_every_row_to_the_range_that_disturbs_its_outputs_least() -> None:
    """One point: nothing is scaled. The inputs of a block are correlated, so without them ranges would be others."""
    model, _ = compressed(FAMILY, make("awq", {"scheme": "int3_g32_asym", "points": 1}))
    grid = named_scheme("int3_g32_asym").weights
    block = measured_first_block(Gram)
    otherwise = 0
    for site in block.sites:
        weight, gram = site.weight_OI, site.statistic(Gram).sum_II
        plain, clipped, blind = (
            restore(round_to_codes(weight, fitted), fitted)
            for fitted in (
                fit(weight, grid),
                fit(weight, grid, search="mse", gram_II=gram),
                fit(weight, grid, search="mse"),
            )
        )
        better = row_errors(clipped - weight, gram) < row_errors(plain - weight, gram)
        wanted = torch.where(better[:, None], clipped, plain)
        torch.testing.assert_close(model.get_submodule(site.name).dense_weight(), wanted)
        otherwise += int(not torch.equal(blind, clipped))
    assert otherwise
