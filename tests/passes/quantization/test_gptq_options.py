"""What each option of gptq means, put together by hand from the numerics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.columns import RoundToGrid, inverse_factor, sweep_columns
from llmcompress.numerics.ranges import RangeSearch
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.apply import apply_passes
from tests.families import tiny_model
from tests.passes.test_laws import make, map_of, windows

FAMILY, SCHEME = "llama_gqa", "int3_g32"


def weights_after(*options: dict[str, object]) -> dict[str, Tensor]:
    model = tiny_model(FAMILY, seed=1)
    passes = [make("gptq", {"scheme": SCHEME, **each}) for each in options]
    model, rows = apply_passes(model, map_of(FAMILY, model), passes, RunContext(windows(), batch=4))
    assert not [row for row in rows if row.degraded]
    return {row.site: model.get_submodule(row.site).dense_weight() for row in rows}


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("act_order", [True, False])
def test_order_and_ranges_are_what_the_options_say(search: RangeSearch, act_order: bool) -> None:
    found = weights_after({"range": search, "act_order": act_order})
    model = tiny_model(FAMILY, seed=1)
    block = next(iter(BlockStream(model, map_of(FAMILY, model), RunContext(windows(), batch=4))))
    block.measure(block.sites, (Gram,))
    for site in block.sites:
        gram = site.statistic(Gram).sum_II
        order = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
        visit = torch.arange(len(gram)) if order is None else order
        factor = inverse_factor(gram, 0.01, order)
        assert factor is not None
        weight = site.weight_OI
        grid = named_scheme(SCHEME).weights
        rounding = RoundToGrid(weight, grid, scale_dtype=torch.float32, search=search, gram_II=gram, order_I=order)
        swept = torch.empty_like(weight)
        swept[:, visit] = sweep_columns(weight[:, visit], factor.upper_II, rounding, block=128)
        torch.testing.assert_close(found[site.name], swept, atol=1e-5, rtol=0)


def test_true_sequential_is_one_pass_for_each_input_after_the_other() -> None:
    together = weights_after({"true_sequential": True})
    apart = weights_after(
        *({"sites": sites} for sites in ("*.[qkv]_proj", "*.o_proj")),
        {"sites": ("*.gate_proj", "*.up_proj")},
        {"sites": "*.down_proj"},
    )
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[site], apart[site]) for site in together)
    at_once = weights_after({})
    assert any(not torch.equal(at_once[site], together[site]) for site in together if ".0." in site)


def test_sites_swept_together_own_their_codes_and_another_scheme_among_them_changes_none() -> None:
    dense = tiny_model(FAMILY, seed=1)
    gptq = make("gptq", {"scheme": SCHEME})
    model, _ = apply_passes(dense, map_of(FAMILY, dense), [gptq], RunContext(windows(), batch=4))
    for module in model.modules():
        if isinstance(module, QuantLinear):
            for tensor in (module.codes_OI, module.scale_OG):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    mixed = weights_after({"overrides": {"*.0.self_attn.k_proj": {"scheme": "int8_g32"}}})
    for name in ("q_proj", "v_proj"):
        site = f"model.layers.0.self_attn.{name}"
        assert torch.equal(mixed[site], model.get_submodule(site).dense_weight())
    key = "model.layers.0.self_attn.k_proj"
    assert not torch.equal(mixed[key], model.get_submodule(key).dense_weight())
