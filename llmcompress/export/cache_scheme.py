"""The key-value cache in the words of compressed-tensors: a `kv_cache_scheme`, and two scales in every attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from transformers import PreTrainedModel

from llmcompress.model.skeleton import put_module
from llmcompress.model.stock import outline
from llmcompress.modules.kv_cache import CodedAttention
from llmcompress.numerics.cache_codes import Number

_KINDS: dict[Number, str] = {"int8": "int", "fp8": "float"}
_SHOWS_PROGRESS = "show_progress" in inspect.signature(apply_quantization_config).parameters


@contextmanager
def stock_attention(model: PreTrainedModel, storage_dtype: torch.dtype) -> Iterator[QuantizationArgs | None]:
    """While it lasts, attentions that cache codes are stock ones with buffers `k_scale` and `v_scale`, as on disk.

    Gives the scheme; None, and the model as it is, when there are none or the format cannot say what they do.
    """
    wrappers = {name: part for name, part in model.named_modules() if isinstance(part, CodedAttention)}
    scheme = _scheme(model, wrappers)
    if scheme is None:
        yield None
        return
    for name, wrapper in wrappers.items():
        put_module(model, name, wrapper.inner)
        wrapper.inner.register_buffer("k_scale", _stored(wrapper.key_scale, storage_dtype))
        wrapper.inner.register_buffer("v_scale", _stored(wrapper.value_scale, storage_dtype))
    try:
        yield scheme
    finally:
        for name, wrapper in wrappers.items():
            del wrapper.inner.k_scale, wrapper.inner.v_scale
            put_module(model, name, wrapper)


def _scheme(model: PreTrainedModel, wrappers: dict[str, CodedAttention]) -> QuantizationArgs | None:
    kinds = {(wrapper.number, wrapper.scales) for wrapper in wrappers.values()}
    if len(kinds) != 1:
        return None
    number, scales = kinds.pop()
    if scales != "tensor":
        return None
    scheme = QuantizationArgs(num_bits=8, type=_KINDS[number], strategy="tensor", dynamic=False, symmetric=True)
    return scheme if _taken_by_loader(model, scheme) == wrappers.keys() else None


def _taken_by_loader(model: PreTrainedModel, scheme: QuantizationArgs) -> set[str]:
    """Modules of the stock model that the library gives scales of keys and values: it goes by names of classes."""
    skeleton = outline(type(model), model.config)
    quiet = {"show_progress": False} if _SHOWS_PROGRESS else {}
    try:
        apply_quantization_config(skeleton, QuantizationConfig(config_groups={}, kv_cache_scheme=scheme), **quiet)
    except ValueError:  # so it answers, while loading too, where a config does not count key-value heads (OPT)
        return set()
    return {name for name, part in skeleton.named_modules() if {"k_scale", "v_scale"} <= part._parameters.keys()}


def _stored(scale: torch.Tensor | None, storage_dtype: torch.dtype) -> torch.Tensor:
    assert scale is not None  # fixed scales are there
    return scale.detach().to(storage_dtype)
