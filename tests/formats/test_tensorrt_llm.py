"""Layouts of TensorRT-LLM: what is packed comes back, and weighs what was foretold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcompress.formats import tensorrt_llm
from llmcompress.formats.named import kinds
from llmcompress.formats.tensorrt_llm import algorithm_of
from llmcompress.modules.scheme import named_scheme
from tests.formats.test_layouts import form

SCHEMES = {
    "int4_g64_positive": "W4A16_AWQ",
    "int3_g128_positive": "W4A16_AWQ",
    "ternary_g64": "W4A16_AWQ",
    "int4_g64_asym": "W4A16_GPTQ",
    "int2_g64_asym": "W4A16_GPTQ",
    "int8_channel": "W8A16",
    "int8_channel_a8tensor": "W8A8_SQ_PER_CHANNEL",
    "fp8_tensor_a8tensor": "FP8",
    "fp8_channel_a8token": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4_a": "NVFP4",
    "nvfp4": "W4A16_NVFP4",
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("shape", [(8, 128), (24, 256)], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_there_and_back(name, shape, alone):
    given, scheme = form(name, shape, torch.bfloat16), named_scheme(name)
    algorithm = algorithm_of(scheme, *shape)
    assert algorithm == SCHEMES[name]
    stored = tensorrt_llm.pack(given, algorithm, torch.bfloat16, alone=alone)
    assert stored.keys() - {"bias"} <= tensorrt_llm.NAMES and torch.equal(stored["bias"], given.bias)
    foretold = tensorrt_llm.tensors(shape, scheme, algorithm, torch.bfloat16, bias=True, alone=alone)
    assert foretold == kinds(stored)
    again = tensorrt_llm.unpack(stored, algorithm)
    exact = replace(given.tensor, scale=given.tensor.scale.float())
    assert torch.equal(again.dense(), exact.dense())
    assert torch.equal(again.centred_codes(), given.tensor.centred_codes())
    group = scheme.weights.length(shape[1])
    assert tensorrt_llm.sizes({part: tuple(each.shape) for part, each in stored.items()}, algorithm) == (*shape, group)
