"""The handle on a linear hides its class and layout."""

from __future__ import annotations

import pytest
import torch

from llmcompress.model.probe import map_model
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from tests.families import tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_is_read_written_and_replaced_as_outputs_by_inputs(family):
    model = tiny_model(family)
    info = map_model(model).blocks[0]
    block = model.get_submodule(info.name)
    for found in info.structure.sites:
        site = LinearSite(info.full(found.name), found, block, torch.float32)
        x = torch.randn(2, found.inputs)
        with torch.no_grad():
            bias = site.bias_O if site.bias_O is not None else 0
            torch.testing.assert_close(site.module(x), x @ site.weight_OI.T + bias)
            site.write(site.weight_OI * 2)
            torch.testing.assert_close(site.module(x), x @ site.weight_OI.T + bias)
            scheme = named_scheme("int8_channel")
            fitted = fit(site.weight_OI, scheme.weights)
            site.replace(QuantLinear.from_fitted(scheme, round_to_codes(site.weight_OI, fitted), fitted, site.bias_O))
            assert site.is_compressed
            torch.testing.assert_close(site.module(x), x @ site.weight_OI.T + bias)
        with pytest.raises(AssertionError):
            site.write(site.weight_OI)
