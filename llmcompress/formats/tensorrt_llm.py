"""The tensors of a quantized linear in the checkpoints that TensorRT-LLM reads. O = outputs, I = inputs, G = groups.

All but GPTQ is the unified Hugging Face checkpoint of NVIDIA ModelOpt; its facts in tests/formats/modelopt_facts.json
come from ModelOpt 0.47 itself (evals/tensorrt_llm.py). GPTQ is the layout of GPTQModel, which TensorRT-LLM converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from llmcompress.formats import gptq
from llmcompress.formats.named import Kind, Named, empty_codes, kinds
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.numerics.formats import E4M3, scales_to_bytes
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.packing import pack_bits, unpack_bits
from llmcompress.numerics.quantized import QuantizedTensor

Algorithm = Literal[
    "W4A16_AWQ",
    "W4A16_GPTQ",
    "W8A16",
    "W8A8_SQ_PER_CHANNEL",
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "NVFP4",
    "W4A16_NVFP4",
]
"""As TensorRT-LLM calls them."""

GROUPS = (64, 128)
"""Inputs that share a scale in the 4-bit integer kernels."""
NAMES = frozenset(
    {
        "weight",
        "weight_scale",
        "weight_scale_2",
        "input_scale",
        "pre_quant_scale",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    }
)
"""What `pack` may return besides the bias."""

_FIXED: dict[str, Algorithm] = {
    "int8_channel": "W8A16",
    "int8_channel_a8tensor": "W8A8_SQ_PER_CHANNEL",
    "fp8_tensor_a8tensor": "FP8",
    "fp8_channel_a8token": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4_a": "NVFP4",
    "nvfp4": "W4A16_NVFP4",
}
"""Schemes that are one algorithm each."""
_SCHEMES: dict[Algorithm, Scheme] = {algorithm: named_scheme(name) for name, algorithm in _FIXED.items()}


def algorithm_of(scheme: Scheme, outputs: int, inputs: int) -> Algorithm | None:
    """What TensorRT-LLM calls a linear of that scheme and shape; None if it has no such thing.

    Integers of fewer bits, and ternary codes, lie in fields of four bits.
    """
    grid = scheme.weights
    if grid.number is None and grid.bits <= 4 and scheme.activations is None and not grid.mirrors:
        fits = grid.length(inputs) in GROUPS and inputs % grid.length(inputs) == 0 and outputs % 8 == 0
        return None if not fits else "W4A16_AWQ" if grid.symmetric else "W4A16_GPTQ"
    found = _FIXED.get(scheme.name)
    return None if found in ("NVFP4", "W4A16_NVFP4") and inputs % 16 else found


def grid_of(algorithm: Algorithm, group: int) -> Grid:
    """The grid that a reader sees."""
    if algorithm in ("W4A16_AWQ", "W4A16_GPTQ"):
        symmetric = algorithm == "W4A16_AWQ"
        return Grid(4, symmetric, group, positive_scales=symmetric)
    return _SCHEMES[algorithm].weights


def scheme_of(algorithm: Algorithm) -> Scheme | None:
    """The scheme that is this algorithm; None where groups and zero points must say which."""
    return _SCHEMES.get(algorithm)


def pack(form: Quantized, algorithm: Algorithm, dtype: torch.dtype, *, alone: bool) -> dict[str, Tensor]:
    """The tensors of a linear; `dtype` is that of its bias and of `pre_quant_scale`.

    `alone`: TensorRT-LLM does not merge it with its neighbours. Of an AWQ linear it then multiplies inputs by
    `pre_quant_scale`, which must be there; ours is 1, as our passes fold such factors into the layer before.
    """
    tensor = form.tensor
    inputs = tensor.shape[1]
    if algorithm == "W4A16_GPTQ":
        layout = _gptq_layout(inputs, tensor.scale.shape[1])
        # float16 would round small scales; TensorRT-LLM takes those of the model's dtype as they are
        return {**gptq.pack(form, layout, dtype), "scales": tensor.scale.T.to(dtype).contiguous()}
    found = _modelopt(tensor, algorithm)
    if algorithm == "W8A8_SQ_PER_CHANNEL" or (algorithm == "W4A16_AWQ" and alone):
        found["pre_quant_scale"] = torch.ones(inputs, dtype=dtype, device=tensor.codes.device)
    if form.input_scale is not None:
        fixed = form.input_scale.detach().float().reshape(())
        found["input_scale"] = 1 / fixed if algorithm == "NVFP4" else fixed
    if form.bias is not None:
        found["bias"] = form.bias.detach().to(dtype)
    return found


def unpack(found: Named, algorithm: Algorithm) -> QuantizedTensor:
    """Codes, scales and zero points, float32 scales; `weight_scale_2` is inverted to what we divide by."""
    if algorithm == "W4A16_GPTQ":
        layout = _gptq_layout(8 * found["qweight"].shape[0], found["scales"].shape[0])
        return gptq.unpack(found, layout, torch.float32)
    stored, scale = found["weight"], found["weight_scale"]
    if algorithm == "W4A16_AWQ":
        codes_OI = torch.stack([_signed(stored & 15), _signed(stored >> 4)], 1).flatten(0, 1)
        grid = grid_of(algorithm, codes_OI.shape[1] // scale.shape[1])
        return QuantizedTensor(codes_OI, scale.float(), None, None, grid)
    grid = grid_of(algorithm, 0)
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        codes_OI = unpack_bits(stored, 4, 0, 2 * stored.shape[1])
        scale_OG = E4M3.decode(scale.view(torch.int8), torch.float32)
        return QuantizedTensor(codes_OI, scale_OG, None, 1 / found["weight_scale_2"].float().reshape(1), grid)
    scale_OG = scale.float().reshape(-1, 1)
    return QuantizedTensor(stored.view(torch.int8), scale_OG, None, None, grid)


def sizes(shapes: Mapping[str, tuple[int, ...]], algorithm: Algorithm) -> tuple[int, int, int]:
    """Outputs, inputs, and inputs that share a scale, from the shapes of the tensors."""
    if algorithm == "W4A16_GPTQ":
        inputs, outputs = 8 * shapes["qweight"][0], shapes["qweight"][1]
        return outputs, inputs, inputs // shapes["scales"][0]
    rows, columns = shapes["weight"]
    scale = shapes["weight_scale"]
    if algorithm == "W4A16_AWQ":
        return 2 * rows, columns, columns // scale[1]
    inputs = 2 * columns if algorithm in ("NVFP4", "W4A16_NVFP4") else columns
    return rows, inputs, inputs // scale[1] if len(scale) == 2 else inputs


def with_shared_scale(tensor: QuantizedTensor, shared: Tensor) -> QuantizedTensor | None:
    """The same two-level matrix, divided by another power of two; None where E4M3 cannot hold a scale exactly."""
    assert tensor.shared_scale is not None
    wanted_OG = tensor.scale.float() * (shared.float() / tensor.shared_scale)
    scale_OG = E4M3.nearest(wanted_OG)
    return replace(tensor, scale=scale_OG, shared_scale=shared) if torch.equal(scale_OG, wanted_OG) else None


@cache
def tensors(
    shape: tuple[int, int], scheme: Scheme, algorithm: Algorithm, dtype: torch.dtype, *, bias: bool, alone: bool
) -> dict[str, Kind]:
    """Names, dtypes and shapes of what `pack` gives for a linear of that shape (O, I)."""
    return kinds(pack(empty_codes(shape, scheme, dtype, bias=bias), algorithm, dtype, alone=alone))


def _modelopt(tensor: QuantizedTensor, algorithm: Algorithm) -> dict[str, Tensor]:
    codes_OI, grid = tensor.codes, tensor.grid
    if algorithm == "W4A16_AWQ":
        # two rows share a byte, not two columns
        packed = (codes_OI[0::2] & 15 | (codes_OI[1::2] << 4)).view(torch.uint8)
        return {"weight": packed, "weight_scale": tensor.scale.float()}
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        assert tensor.shared_scale is not None
        return {
            "weight": pack_bits(codes_OI, 4, grid.low),
            "weight_scale": scales_to_bytes(tensor.scale, grid.scales).view(torch.float8_e4m3fn),
            "weight_scale_2": 1 / tensor.shared_scale.float().reshape(()),
        }
    weight = codes_OI if grid.number is None else codes_OI.view(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": tensor.scale.float().reshape(() if grid.scales.single else -1)}


def _gptq_layout(inputs: int, groups: int) -> gptq.Layout:
    return gptq.Layout(4, inputs // groups, symmetric=False, version=2)


def _signed(nibbles: Tensor) -> Tensor:
    """Two's complement of four bits."""
    signed: Tensor = ((nibbles ^ 8).to(torch.int16) - 8).to(torch.int8)
    return signed
