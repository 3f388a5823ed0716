"""Compiles a model ahead of time: one library for prefill and decoding, with a KV cache that goes in and comes out.

O = outputs, I = inputs, G = groups, B = bytes, T = tokens, H = key-value heads, P = tokens in the cache, D = head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from llmcompress.calibration.tokens import max_positions
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.skeleton import put_module
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.quant_linear import QuantLinear, quantized_linears
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.packing import pack_bits

_EXAMPLE = (7, 5)
"""Tokens fed and tokens cached while the model is followed: two numbers that no size of a model is by accident."""
_UNLIMITED = 1 << 20
_SETTINGS: Mapping[str, Any] = {
    # tensors are in a file of their own
    "aot_inductor.package_constants_in_so": False,
    # every tensor is asked for by its name, also one whose elements are all equal
    "joint_graph_constant_folding": False,
    "always_keep_tensor_constants": True,
}


@dataclass(frozen=True)
class Program:
    """What was compiled."""

    tensors: Mapping[str, Tensor]
    """What the library asks for, by its names."""
    cache: Sequence[tuple[int, int]]
    """Heads and head size of the keys and of the values of every block, in turns."""


class Step(nn.Module):
    """Logits of new tokens, and the cache with them: what is compiled."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_1T: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`past`: of every block keys and values, 1×H×P×D, also with P = 0."""
        cache = DynamicCache()
        for block in range(len(past) // 2):
            cache.update(past[2 * block], past[2 * block + 1], block)
        mask = torch.ones(1, past[0].shape[2] + ids_1T.shape[1], dtype=torch.long)
        out = self.model(input_ids=ids_1T, attention_mask=mask, past_key_values=cache, use_cache=True)
        return out.logits, [each for layer in cache.layers for each in (layer.keys, layer.values)]


class PackedCodes(nn.Module):
    """A quantized linear whose codes are fields of 2, 4 or 8 bits, packed into bytes with the lowest bits first."""

    def __init__(self, site: QuantLinear) -> None:
        super().__init__()
        self.leaf, self.bits = site.leaf(), field_bits(site.scheme)
        tensor = self.leaf.tensor
        self.register_buffer("codes", pack_bits(tensor.codes, self.bits, self.low))
        self.register_buffer("scale_OG", tensor.scale)
        self.register_buffer("zero_OG", tensor.zero_point)
        self.register_buffer("input_scale", self.leaf.input_scale)
        self.register_buffer("bias", self.leaf.bias)

    @property
    def low(self) -> int:
        """The code that a field of zeros means."""
        return -(1 << (self.bits - 1))

    def unpacked(self, codes_OB: Tensor) -> Tensor:
        """O×I int8."""
        outputs, inputs = self.leaf.shape
        fields = [codes_OB >> place & (1 << self.bits) - 1 for place in range(0, 8, self.bits)]
        return (torch.stack(fields, -1).reshape(outputs, -1)[:, :inputs].to(torch.int16) + self.low).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """As the linear that was packed."""
        held = dict(self.named_buffers())
        tensor = replace(
            self.leaf.tensor,
            codes=self.unpacked(held["codes"]),
            scale=held["scale_OG"],
            zero_point=held.get("zero_OG"),
        )
        return Quantized(tensor, self.leaf.activations, held.get("input_scale"), bias=held.get("bias"))(x)


def field_bits(scheme: Scheme) -> int:
    """Of a field that holds a code in the file."""
    return next(bits for bits in (2, 4, 8) if scheme.weights.bits <= bits)


@contextmanager
def packed_linears(model: PreTrainedModel) -> Iterator[None]:
    """The same model with the codes of its linears packed, and afterwards as it was."""
    coded = quantized_linears(model)
    found = {name: part for name, part in coded.items() if isinstance(part.expression(), Quantized)}
    try:
        for name, part in found.items():
            put_module(model, name, PackedCodes(part))
        yield
    finally:
        for name, part in found.items():
            put_module(model, name, part)


@torch.no_grad()
def compile_program(model: PreTrainedModel, file: Path) -> Program:
    """Write the library as a package of AOTInductor.

    Raises: CompressError where torch or a C++ compiler cannot, with what it said.
    """
    inductor: Any = importlib.import_module("torch._inductor")
    shapes = importlib.import_module("torch.fx.experimental._config")
    if not hasattr(shapes, "backed_size_oblivious"):
        raise CompressError(
            "export.package",
            f"torch {torch.__version__} cannot compile one program for prefill and decoding",
            fix="install torch 2.9 or newer",
            exit_code=ExitCode.REFUSED,
        )
    model.eval()  # which puts factors in column order: a program remembers the order in memory, and the file has one
    for each in (*model.parameters(), *model.buffers()):
        each.data = each.data.contiguous()
    step, (tokens, cached) = Step(model), _EXAMPLE
    cache = cache_sizes(model)
    given = (torch.zeros(1, tokens, dtype=torch.long), [torch.zeros(1, heads, cached, size) for heads, size in cache])
    most = max_positions(model.config) or _UNLIMITED
    new, past = torch.export.Dim("new", min=1, max=most), torch.export.Dim("past", min=0, max=most)
    try:
        # sizes of 0 and 1 are sizes like any other: an empty cache, and one token at a time
        with shapes.patch(backed_size_oblivious=True):
            followed = torch.export.export(
                step, given, dynamic_shapes=({1: new}, [{2: past} for _ in cache]), strict=False
            )
            inductor.aoti_compile_and_package(followed, package_path=str(file), inductor_configs=dict(_SETTINGS))
    except Exception as problem:  # torch, Inductor and the compiler raise classes that share no base but this one
        raise CompressError(
            "export.graph",
            f"torch cannot compile this model ahead of time: {str(problem)[:500]}",
            fix="install a C++ compiler (`g++`) if that is what is missing; otherwise export to `onnx`",
            exit_code=ExitCode.REFUSED,
        ) from problem
    held = {**followed.state_dict, **{name: each for name, each in followed.constants.items() if torch.is_tensor(each)}}
    asked = inductor.aoti_load_package(str(file)).get_constant_fqns()
    found = {name: held[name].detach() for name in sorted(asked)}  # in row order, also when factors are turned again
    model.eval()
    return Program(found, cache)


def cache_sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and head size of the keys and of the values of every block, in turns, as the model itself makes them."""
    cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    both = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    return [(each.shape[1], each.shape[3]) for each in both]
