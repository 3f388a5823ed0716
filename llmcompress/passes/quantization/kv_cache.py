"""KV cache quantization: keys and values in one byte per number, half the memory of 16 bits. H = heads, D = width."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.cache_users import CacheUser, cache_users, watch_cache
from llmcompress.model.skeleton import put_module
from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.modules.kv_cache import CodedAttention, Scales, cache_bytes_of
from llmcompress.numerics.cache_codes import Number, scale_for
from llmcompress.passes.base import PASSES, ModelPass, Trait
from llmcompress.records.rows import SiteReport

_TOKENS = 8
"""Of the text on which a cached decode is compared with one forward pass."""


@PASSES.register("kv_cache")
class KeyValueCache(ModelPass):
    """Store the keys and values of every attention in one byte per number.

    What the model puts into its cache (keys after the rotary embedding) is quantized at that one place, for the newest
    token too, so perplexity over whole windows and token-by-token generation compute the same. Weights and file size do
    not change: generation needs less memory. Prompts are quantized at once.

    Source: Liu et al. (LLM-QAT), arXiv 2305.17888 (symmetric, per token, min-max).
    Differs: one scale per token and head; optionally static scales, as in runtimes with an fp8 cache.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"cache"})
    keeps_codes: ClassVar[bool] = True

    dtype: Number = Field("int8", description="int8, or fp8 (E4M3)")
    scales: Scales = Field(
        "token",
        description="token: dynamic, one per token and head (2 bytes each); channel: static, per head and channel; "
        "tensor: static, one for keys and one for values per layer, which compressed-tensors can represent "
        "(stock transformers then quantizes and dequantizes, without saving memory)",
    )

    @override
    def uses_data(self) -> bool:
        return self.scales != "token"

    @override
    def needs_plugin(self) -> bool:
        return self.scales != "tensor"  # compressed-tensors can represent those

    @override
    def conflict_with(self, trait: Trait) -> str | None:
        return "would quantize a KV cache that is already quantized" if trait == "cache" else None

    @override
    @torch.no_grad()
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Put a wrapper around every module that stores keys and values; nothing else changes.

        Raises: CompressError when the model uses no such cache, or in another way than by storing and reading it.
        """
        with whole.resident() as model:
            ids_BT = torch.arange(3, 3 + _TOKENS, device=whole.context.device)[None]
            users = cache_users(model, ids_BT)
            scales = self._fixed_scales(whole, model) if self.uses_data() else {}
            for user in users:
                inner = model.get_submodule(user.name)
                wrapper = CodedAttention(self.dtype, self.scales, user.argument, user.heads, user.widths)
                if user.layer in scales:
                    wrapper.key_scale, wrapper.value_scale = scales[user.layer]
                wrapper.to(whole.context.device).take(inner)
                put_module(model, user.name, wrapper.train(inner.training))
            _check(model, ids_BT)
            return [self._row(user, whole) for user in users]

    def _row(self, user: CacheUser, whole: WholeModel) -> SiteReport:
        return SiteReport(
            site=user.name,
            algorithm="kv_cache",
            tokens=whole.context.windows_NT.numel() if self.uses_data() else None,
            cache_bytes=cache_bytes_of(whole.model.get_submodule(user.name)),
            cache_bytes_before=user.numbers_per_token * whole.context.storage_dtype.itemsize,
        )

    def _fixed_scales(self, whole: WholeModel, model: PreTrainedModel) -> dict[int, tuple[Tensor, Tensor]]:
        """Scales of keys and values by layer of the cache, from the largest magnitudes on calibration text."""
        peaks: dict[int, list[Tensor]] = {}

        def see(keys: Tensor, values: Tensor, layer: int) -> None:
            new = [x.abs().amax((0, 2)).float() for x in (keys, values)]  # H×D
            old = peaks.get(layer, new)
            peaks[layer] = [torch.maximum(a, b) for a, b in zip(old, new, strict=True)]

        for ids_BT in whole.batches():
            watch_cache(model, ids_BT, see)
        return {layer: (self._scale(keys), self._scale(values)) for layer, (keys, values) in peaks.items()}

    def _scale(self, peak_HD: Tensor) -> Tensor:
        shaped = peak_HD[:, None] if self.scales == "channel" else peak_HD.max().reshape(1)
        return scale_for(shaped, self.dtype).float()


def _check(model: PreTrainedModel, ids_BT: Tensor) -> None:
    """A cached decode computes what one forward pass computes.

    Raises: CompressError when it does not: some attention reads keys and values past its cache.
    """
    whole = model(input_ids=ids_BT, use_cache=False).logits[:, -1].float()
    cache = cache_of(model(input_ids=ids_BT[:, :-2], use_cache=True))
    for place in range(ids_BT.shape[1] - 2, ids_BT.shape[1]):
        out = model(input_ids=ids_BT[:, place : place + 1], **with_cache(model.forward, cache), use_cache=True)
        cache = cache_of(out)
    # the median: sums in another order move a number to the next code now and then
    apart = (out.logits[:, -1].float() - whole).abs().median()
    if apart > 0.01 * whole.abs().max():
        raise CompressError(
            "kv_cache.differs",
            f"a cached decode of {type(model).__name__} does not compute what one forward pass computes",
            fix="leave kv_cache out for this model",
        )
