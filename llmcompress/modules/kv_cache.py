"""An attention with a quantized KV cache, one byte per number. H = key-value heads, D = head width."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.modules.base import MODULES, Spec
from llmcompress.modules.cache_names import CACHE_NAMES
from llmcompress.modules.expression import Expression, Opaque
from llmcompress.modules.wrapper import Wrapper
from llmcompress.numerics.cache_codes import (
    SCALE_BYTES,
    Number,
    from_codes,
    pack_vectors,
    to_codes,
    unpack_vectors,
)
from llmcompress.numerics.fake_quant import passing

Scales = Literal["token", "channel", "tensor"]
"""One per token and head, found while running and stored with the codes; fixed ones per head and channel, or one for
all keys and one for all values of a layer, from calibration."""


@dataclass(frozen=True)
class Coding:
    """How keys or values are stored; `scale` is None if every vector has its own."""

    number: Number
    scale: Tensor | None

    def encode(self, x: Tensor) -> Tensor:
        """B×H×T×D → codes, int8."""
        return pack_vectors(x, self.number) if self.scale is None else to_codes(x, self.scale, self.number)

    def rounded(self, x: Tensor) -> Tensor:
        """There and back."""
        return self.decode(self.encode(x), x.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantize for attention."""
        if self.scale is None:
            return unpack_vectors(codes, self.number, dtype)
        return from_codes(codes, self.scale, self.number, dtype)


class _Coded:
    """A layer of transformers' cache that stores codes; everything but `update` is the stock layer's own.

    Keys and values are rounded when they enter, and attention is given what was stored, that of the newest tokens
    too: a prompt in one call and token by token is the same.
    """

    key_coding: Coding
    value_coding: Coding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the codes; all keys and values that the stock layer would give, restored."""
        dtype = key_states.dtype
        stored = super().update(  # type: ignore[misc]
            self.key_coding.encode(key_states), self.value_coding.encode(value_states), *args, **kwargs
        )
        return self.key_coding.decode(stored[0], dtype), self.value_coding.decode(stored[1], dtype)


class CodedLayer(_Coded, DynamicLayer):  # type: ignore[misc]
    """Grows with every token."""


class CodedSlidingLayer(_Coded, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Keeps the tokens of its window."""


_CODED: dict[type, Any] = {DynamicLayer: CodedLayer, DynamicSlidingWindowLayer: CodedSlidingLayer}


def coded(layer: Any, keys: Coding, values: Coding) -> Any:
    """The same cache layer, quantized; its current contents are quantized now.

    Raises: CompressError for a kind of cache that cannot hold codes.
    """
    if isinstance(layer, _Coded):
        return layer
    kind = _CODED.get(type(layer))
    if kind is None:
        raise CompressError(
            "kv_cache.layer",
            f"this model quantizes its KV cache, which a {type(layer).__name__} does not support",
            where="the cache that was passed, or `cache_implementation`",
            fix='use the default cache (`cache_implementation="dynamic"`)',
        )
    changed = kind.__new__(kind)
    vars(changed).update(vars(layer))
    changed.key_coding, changed.value_coding = keys, values
    if layer.get_seq_length():
        changed.keys, changed.values = keys.encode(layer.keys), values.encode(layer.values)
    return changed


class _RoundingCache(DynamicCache):  # type: ignore[misc]
    """For one forward with gradients: keys and values are rounded as in a cache of codes, and their gradients pass."""

    def __init__(self, keys: Coding, values: Coding) -> None:
        super().__init__()
        self._keys, self._values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Nothing is kept: there is no earlier token."""
        return passing(self._keys.rounded, key_states), passing(self._values.rounded, value_states)


class _CodingCache:
    """The cache that came, whose layer becomes one of codes as soon as something is stored in it."""

    def __init__(self, cache: Any, keys: Coding, values: Coding) -> None:
        self._cache, self._keys, self._values = cache, keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As the cache does it, in codes."""
        layers, kind = self._cache.layers, self._cache.layer_class_to_replicate
        while kind is not None and len(layers) <= layer_idx:
            layers.append(kind())
        layers[layer_idx] = coded(layers[layer_idx], self._keys, self._values)
        return self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)


@MODULES.register("coded_cache")
class CodedAttention(Wrapper):
    """An attention module that stores its keys and values quantized in any cache it is given.

    Without a cache it uses one of its own for the call, so that a forward pass over a whole text and cached decoding
    compute the same; gradients pass through the rounding. `argument` is the name of the inner module's cache argument;
    `heads` and `widths` are those of keys and of values.
    """

    key_scale: Tensor | None
    value_scale: Tensor | None

    def __init__(
        self, number: Number, scales: Scales, argument: str, heads: tuple[int, int], widths: tuple[int, int]
    ) -> None:
        super().__init__()
        self.number, self.scales, self.argument = number, scales, argument
        self.heads, self.widths = heads, widths
        for name, count, width in zip(("key_scale", "value_scale"), heads, widths, strict=True):
            shape = {"token": None, "channel": (count, 1, width), "tensor": (1,)}[scales]
            self.register_buffer(name, None if shape is None else torch.ones(shape))
        self._position = -1

    @override
    def take(self, replaced: nn.Module) -> None:
        super().take(replaced)
        parameters = list(inspect.signature(replaced.forward).parameters.values())
        names = [each.name for each in parameters]
        if self.argument not in names:  # saved by a version of transformers that called it otherwise
            self.argument = next((name for name in CACHE_NAMES if name in names), self.argument)
        if self.argument not in names and not any(each.kind is each.VAR_KEYWORD for each in parameters):
            raise CompressError(
                "kv_cache.argument",
                f"{type(replaced).__name__} has no argument {self.argument!r} in this version of transformers",
                fix="load it with the version of transformers in its llmcompress_report.json",
            )
        self._position = names.index(self.argument) if self.argument in names else len(names)

    @override
    def spec(self) -> Spec:
        return {
            "number": self.number,
            "scales": self.scales,
            "argument": self.argument,
            "heads": list(self.heads),
            "widths": list(self.widths),
        }

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        heads, widths = (cast(tuple[int, int], tuple(map(int, spec[key]))) for key in ("heads", "widths"))
        return cls(spec["number"], spec["scales"], str(spec["argument"]), heads, widths)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in the cache."""
        return self.cache_bytes_per_token(self.spec())

    @classmethod
    @override
    def cache_bytes_per_token(cls, spec: Spec) -> int:
        scale = SCALE_BYTES if spec["scales"] == "token" else 0
        return sum(
            int(heads) * (int(width) + scale) for heads, width in zip(spec["heads"], spec["widths"], strict=True)
        )

    @override
    def expression(self) -> Expression:
        return Opaque("keys and values are rounded as they enter the cache, inside the attention")

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's output, computed with the keys and values that the cache holds."""
        positional = len(args) > self._position
        given = args[self._position] if positional else kwargs.get(self.argument)
        keys, values = Coding(self.number, self.key_scale), Coding(self.number, self.value_scale)
        coding: Any = _RoundingCache(keys, values)
        if given is not None or not torch.is_grad_enabled():
            coding = _CodingCache(DynamicCache() if given is None else given, keys, values)
        if positional:
            args = (*args[: self._position], coding, *args[self._position + 1 :])
        else:
            kwargs[self.argument] = coding
        output = self.inner(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(given if each is coding else each for each in output)
        return output

    @override
    def extra_repr(self) -> str:
        return f"keys and values in {self.number}, scales per {self.scales}"


def cache_bytes_of(module: nn.Module) -> int:
    """What one token takes in the cache of an attention of which the caller knows that it stores codes."""
    assert isinstance(module, CodedAttention)
    return module.bytes_per_token


def coded_attentions(model: nn.Module) -> dict[str, CodedAttention]:
    """Full name → every attention with a quantized KV cache."""
    return {name: part for name, part in model.named_modules() if isinstance(part, CodedAttention)}
