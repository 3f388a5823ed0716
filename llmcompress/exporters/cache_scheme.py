"""The quantized KV cache in compressed-tensors: a `kv_cache_scheme`, and two scales in every attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from transformers import PreTrainedModel

from llmcompress.model.skeleton import put_module
from llmcompress.model.stock import meta_model
from llmcompress.modules.kv_cache import CodedAttention, coded_attentions
from llmcompress.numerics.cache_codes import Number

_KINDS: dict[Number, str] = {"int8": "int", "fp8": "float"}
_SHOWS_PROGRESS = "show_progress" in inspect.signature(apply_quantization_config).parameters


@dataclass(frozen=True)
class CacheScheme:
    """How keys and values are quantized, in the format's terms."""

    words: QuantizationArgs
    attentions: Mapping[str, CodedAttention]


def cache_scheme(model: PreTrainedModel) -> CacheScheme | None:
    """None when no attention caches codes, or the format cannot say what they do."""
    wrappers = coded_attentions(model)
    kinds = {(wrapper.number, wrapper.scales) for wrapper in wrappers.values()}
    if len(kinds) != 1:
        return None
    number, scales = kinds.pop()
    if scales != "tensor":
        return None
    words = QuantizationArgs(num_bits=8, type=_KINDS[number], strategy="tensor", dynamic=False, symmetric=True)
    return CacheScheme(words, wrappers) if _taken_by_loader(model, words) == wrappers.keys() else None


@contextmanager
def stock_attention(model: PreTrainedModel, storage_dtype: torch.dtype) -> Iterator[QuantizationArgs | None]:
    """While it lasts, attentions that cache codes are stock ones with buffers `k_scale` and `v_scale`, as on disk.

    Gives the scheme; None, and the model as it is, when there is none.
    """
    found = cache_scheme(model)
    if found is None:
        yield None
        return
    for name, wrapper in found.attentions.items():
        put_module(model, name, wrapper.inner)
        wrapper.inner.register_buffer("k_scale", _stored(wrapper.key_scale, storage_dtype))
        wrapper.inner.register_buffer("v_scale", _stored(wrapper.value_scale, storage_dtype))
    try:
        yield found.words
    finally:
        for name, wrapper in found.attentions.items():
            del wrapper.inner.k_scale, wrapper.inner.v_scale
            put_module(model, name, wrapper)


def _taken_by_loader(model: PreTrainedModel, scheme: QuantizationArgs) -> set[str]:
    """Modules of the stock model that the library gives scales of keys and values: it goes by names of classes."""
    skeleton = meta_model(type(model), model.config)
    quiet = {"show_progress": False} if _SHOWS_PROGRESS else {}
    try:
        apply_quantization_config(skeleton, QuantizationConfig(config_groups={}, kv_cache_scheme=scheme), **quiet)
    except ValueError:  # so it answers, while loading too, where a config does not count key-value heads (OPT)
        return set()
    return {name for name, part in skeleton.named_modules() if {"k_scale", "v_scale"} <= part._parameters.keys()}


def _stored(scale: torch.Tensor | None, storage_dtype: torch.dtype) -> torch.Tensor:
    assert scale is not None  # fixed scales are there
    return scale.detach().to(storage_dtype)
