"""An FP8 KV cache in TensorRT-LLM's checkpoints: `k_proj.k_scale` and `v_proj.v_scale` of every attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.exporters.contents import Contents
from llmcompress.model.skeleton import put_module
from llmcompress.modules.base import MODULES
from llmcompress.modules.kv_cache import CodedAttention, coded_attentions

FP8_CACHE = (
    "scales of the FP8 KV cache are in the files, as ModelOpt writes them; TensorRT-LLM's PyTorch backend stores keys "
    "and values as FP8 with scale 1 and does not use them"
)


def fp8_caches(contents: Contents) -> frozenset[str]:
    """Attentions whose cache is FP8 with one scale for keys and one for values."""
    kind = MODULES.name_of(CodedAttention)
    wanted = {"type": kind, "number": "fp8", "scales": "tensor"}
    return frozenset(name for name, spec in contents.differences.modules.items() if wanted.items() <= spec.items())


@contextmanager
def stock_attentions(model: PreTrainedModel) -> Iterator[dict[str, CodedAttention]]:
    """While it lasts, attentions that cache codes are stock ones; gives the wrappers that were around them."""
    with ExitStack() as undo:
        wrappers = coded_attentions(model)
        for name, wrapper in wrappers.items():
            put_module(model, name, wrapper.inner)
            undo.callback(put_module, model, name, wrapper)
        yield wrappers


@contextmanager
def cache_scales(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, attentions that cache codes are stock ones whose projections have the scales, as in the files.

    A family that merges its projections has no `k_proj`; the files name one all the same.
    """
    with stock_attentions(model) as wrappers, ExitStack() as undo:
        for wrapper in wrappers.values():
            for projection, leaf, scale in (
                ("k_proj", "k_scale", wrapper.key_scale),
                ("v_proj", "v_scale", wrapper.value_scale),
            ):
                assert scale is not None  # other kinds of scales are refused
                _lend(undo, wrapper.inner, projection, leaf, scale.detach().float().reshape(()))
        yield


def _lend(undo: ExitStack, attention: nn.Module, projection: str, leaf: str, scale: Tensor) -> None:
    """Register a buffer for as long as `undo` is open."""
    holder = getattr(attention, projection, None)
    if holder is None:
        holder = nn.Module()
        attention.add_module(projection, holder)
        undo.callback(attention._modules.pop, projection)
    holder.register_buffer(leaf, scale)
    undo.callback(holder._buffers.pop, leaf)
