"""Saves codes and scales as compressed-tensors: loads in stock transformers and vLLM, nothing of ours needed.

O = outputs, I = inputs. What the loaders were seen to do: docs/decisions/0004-saved-formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.homes import Home, InMemory
from llmcompress.errors import CompressError
from llmcompress.export.base import Layout, PlannedSite, Saved, ZeroPoints, problems
from llmcompress.export.checkpoint import linears_of_loader, merges_on_load, name_on_disk, quantized_sites, write_model
from llmcompress.export.config import portable_config
from llmcompress.export.plain import dense_tensors
from llmcompress.export.quantization_config import numbered, quantization_config
from llmcompress.modules.quant_linear import QuantLinear, from_bits
from llmcompress.numerics.formats import TWO_LEVEL, scales_to_bytes
from llmcompress.numerics.grid import spread
from llmcompress.numerics.packing import pack_bits


def save_compressed_tensors(
    model: PreTrainedModel,
    folder: Path,
    *,
    storage_dtype: torch.dtype,
    max_shard_size: str,
    zero_points: ZeroPoints = "folded",
    cache: QuantizationArgs | None = None,
    home: Home | None = None,
) -> Saved:
    """Write an ordinary Hugging Face folder whose quantized linears are codes and scales; the model is not changed.

    A site that the format cannot hold is multiplied out and named in the result; when no other is left, and keys and
    values are not stored as codes (`cache`) either, the folder is a plain one.

    Raises: CompressError when such a site also rounds activations (`check_format` says so before any work).
    """
    sites, linears = quantized_sites(model), linears_of_loader(model)
    planned = {name: _planned(name, site, linears.get(name, nn.Linear), zero_points) for name, site in sites.items()}
    dense: dict[str, str] = {}
    unfused = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | QuantLinear)]
    for problem in problems(planned.values(), merged_on_load=merges_on_load(model), linears=unfused):
        if not problem.dense_instead:
            raise CompressError(
                "save.format",
                problem.reason,
                where=problem.site,
                fix="leave the site out with `exclude`, or use a scheme that does not round activations",
                saved="all finished blocks",
            )
        dense[problem.site] = problem.reason

    def tensors(name: str, site: QuantLinear) -> dict[str, Tensor]:
        if name in dense:
            return dense_tensors(site, linears.get(name, nn.Linear), storage_dtype)
        return coded_tensors(site, planned[name].layout, storage_dtype)

    config = portable_config(model, storage_dtype)
    coded = [planned[name] for name in sites if name not in dense]
    flat: set[str] = set()
    if coded:
        with (home or InMemory()).running(model, model.device):
            flat = _flat_inputs(model, {site.name: sites[site.name] for site in coded})
    if coded or cache:
        # experts have other names on disk than as modules of transformers 5
        on_disk = [replace(site, name=name_on_disk(model, site.name)) for site in coded]
        flat = {name_on_disk(model, name) for name in flat}
        config["quantization_config"] = quantization_config(on_disk, flat, linears, cache)
    files, size = write_model(
        model,
        folder,
        config,
        {name: partial(tensors, name, site) for name, site in sites.items()},
        storage_dtype=storage_dtype,
        max_shard_size=max_shard_size,
        home=home,
    )
    return Saved(files, size, "compressed-tensors" if coded or cache else "plain", dense)


def coded_tensors(site: QuantLinear, layout: Layout, storage_dtype: torch.dtype) -> dict[str, Tensor]:
    """A site as the library's compressors lay it out."""
    tensors = _codes(site, layout) | _scales(site, storage_dtype)
    if site.zero_OG is not None and not layout.symmetric:
        packed = layout.packs_zero_points
        tensors["weight_zero_point"] = (
            pack_to_int32(site.zero_OG, layout.bits, packed_dim=0).contiguous() if packed else site.zero_OG
        )
    if site.bias is not None:
        tensors["bias"] = site.bias.detach().to(storage_dtype)
    return tensors


def _codes(site: QuantLinear, layout: Layout) -> dict[str, Tensor]:
    codes_OI, grid = site.codes_OI, site.scheme.weights
    if layout.packs_floats:
        return {"weight_packed": pack_bits(codes_OI, grid.bits, grid.low)}
    if grid.number is not None:
        return {"weight": codes_OI.view(torch.float8_e4m3fn)}
    if site.zero_OG is not None and layout.symmetric:
        codes_OI = codes_OI - spread(site.zero_OG, grid, site.in_features)
    if layout.format == "pack-quantized":
        return {"weight_packed": pack_to_int32(codes_OI, layout.bits), "weight_shape": torch.tensor(codes_OI.shape)}
    return {"weight": codes_OI}


def _scales(site: QuantLinear, storage_dtype: torch.dtype) -> dict[str, Tensor]:
    grid = site.scheme.weights
    scale = scales_to_bytes(site.scale_OG, grid.scales)
    if grid.scales == TWO_LEVEL:
        scale = scale.view(torch.float8_e4m3fn)
    elif grid.scales.single:
        scale = scale.reshape(1)
    tensors = {"weight_scale": scale.to(storage_dtype) if grid.scales.bits is None else scale}
    if site.shared_scale is not None:
        tensors["weight_global_scale"] = from_bits(site.shared_scale)
    if site.input_scale is not None and site.scheme.activations == "group":
        tensors["input_global_scale"] = from_bits(site.input_scale)
    elif site.input_scale is not None:
        tensors["input_scale"] = site.input_scale.reshape(1).to(storage_dtype)
    return tensors


def _planned(name: str, site: QuantLinear, loader_class: type[nn.Module], zero_points: ZeroPoints) -> PlannedSite:
    return PlannedSite(
        name,
        site.scheme,
        site.in_features,
        is_linear=issubclass(loader_class, nn.Linear),
        packable=loader_class is nn.Linear,
        zero_points=zero_points,
    )


@torch.no_grad()
def _flat_inputs(model: PreTrainedModel, sites: Mapping[str, QuantLinear]) -> set[str]:
    """Sites whose inputs come as tokens × channels (experts, OPT), seen in one forward of four tokens.

    An expert that no token reached is taken to be like its siblings.
    """
    seen: set[str] = set()

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].dim() == 2:
                seen.add(numbered(name))

        return note

    per_token = {name: site for name, site in sites.items() if site.scheme.activations == "token"}
    if not per_token:
        return set()
    with ExitStack() as hooks:
        for name, site in per_token.items():
            hooks.callback(site.register_forward_pre_hook(watch(name)).remove)
        model(input_ids=torch.tensor([[0, 1], [1, 0]], device=model.device), use_cache=False)
    return {name for name in per_token if numbered(name) in seen}
