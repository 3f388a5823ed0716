"""Chooses how a finished model is stored: plain, compressed-tensors, or our manifest where neither has words for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmcompress.calibration.homes import Home
from llmcompress.errors import CompressError
from llmcompress.export.base import Format, Saved, ZeroPoints, speechless
from llmcompress.export.bitsandbytes import save_bitsandbytes
from llmcompress.export.cache_scheme import stock_attention
from llmcompress.export.checkpoint import quantized_sites
from llmcompress.export.compressed_tensors import save_compressed_tensors
from llmcompress.export.manifest import save_with_manifest
from llmcompress.export.plain import save_plain
from llmcompress.model.stock import stock_outline
from llmcompress.modules.experts import UnfusedExperts
from llmcompress.modules.manifest import Manifest, changes


def save_model(
    model: PreTrainedModel,
    folder: Path,
    wanted: Format,
    *,
    storage_dtype: torch.dtype,
    max_shard_size: str,
    zero_points: ZeroPoints = "folded",
    home: Home | None = None,
) -> Saved:
    """Write an ordinary Hugging Face folder, block after block; the model is not changed, its weights go home.

    Raises: CompressError when `wanted` cannot hold the model.
    """
    found = _differences(model)
    if wanted == "auto" and found.modules and {spec["type"] for spec in found.modules.values()} == {"bnb_linear"}:
        return save_bitsandbytes(model, folder, storage_dtype=storage_dtype, max_shard_size=max_shard_size)
    if wanted == "plain":
        return save_plain(model, folder, storage_dtype=storage_dtype, max_shard_size=max_shard_size, home=home)
    schemes = {name: site.scheme for name, site in quantized_sites(model).items()}
    own_width = wanted == "llmcompress" and bool(found)
    if not own_width and (wanted == "compressed-tensors" or not speechless(schemes, storage_dtype)):
        with stock_attention(model, storage_dtype) as cache:
            rest = _differences(model) if cache else found
            if not rest.needs_plugin:
                return save_compressed_tensors(
                    model,
                    folder,
                    storage_dtype=storage_dtype,
                    max_shard_size=max_shard_size,
                    zero_points=zero_points,
                    cache=cache,
                    home=home,
                )
    if wanted == "compressed-tensors":
        raise CompressError(
            "save.format",
            "compressed-tensors has no words for this model: it is more than quantized",
            where=next(iter([*found.modules, *found.shapes, *found.attributes])),
            fix="set `save.format` to auto: the folder then loads after `import llmcompress`",
            saved="all finished work: run again with another format",
        )
    unfused = [name for name in found.modules if isinstance(model.get_submodule(name), UnfusedExperts)]
    if unfused:
        raise CompressError(
            "save.experts",
            "transformers 5 loads compressed experts only from plain and compressed-tensors folders",
            where=unfused[0],
            fix='leave them out with `exclude: "*.experts.*"`, or use integer or fp8 schemes on them',
            saved="all finished work",
        )
    return save_with_manifest(
        model, folder, found, storage_dtype=storage_dtype, max_shard_size=max_shard_size, home=home
    )


def _differences(model: PreTrainedModel) -> Manifest:
    """From the stock model; experts that stayed ordinary linears are stored under the names of the stock bank."""
    found = changes(model, stock_outline(model))
    banks = {name: part for name, part in model.named_modules() if isinstance(part, UnfusedExperts)}
    dense = {name for name, bank in banks.items() if bank.is_dense()}
    return replace(found, modules={name: spec for name, spec in found.modules.items() if name not in dense})
