"""What a run would do and need, from the recipe, config.json and safetensors headers: no weight is read.

O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import prod

import torch
from pydantic import BaseModel, ConfigDict

from llmcompress.cost import Machine, Offload, cost, must_offload
from llmcompress.errors import CompressError
from llmcompress.export.base import Layout, Loader, ZeroPoints, check_format, planned_sites, speechless, unsupported
from llmcompress.export.checkpoint import loader_of
from llmcompress.loading.preflight import Preflight, preflight
from llmcompress.loading.source import Source
from llmcompress.loading.tensors import write_header
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.probe import probe
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.formats import POWER_OF_TWO, TWO_LEVEL, ScaleKind
from llmcompress.numerics.packing import packed_bytes
from llmcompress.passes.apply import stages
from llmcompress.passes.base import PASSES
from llmcompress.passes.schemes import site_schemes
from llmcompress.progress import Progress
from llmcompress.recipe.model import Recipe
from llmcompress.recipe.order import check_order, check_sites

Shape = tuple[int, ...]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlannedSite(_Row):
    """What would become of one linear."""

    site: str
    passes: tuple[str, ...]
    """Recipe names of the passes that work on it, in order."""
    scheme: str | None
    """None: it stays dense."""
    bits_per_weight: float
    """Bits on disk ÷ weights of the dense site: codes, scales and zero points, or the dense type."""
    bytes: int
    """On disk, its bias included."""
    kept_share: float = 1.0
    """Share of its parameters left after pruning or decomposition; an estimate where data decide."""


class Plan(_Row):
    """What a run would do."""

    model: str
    family: str
    sites: tuple[PlannedSite, ...]
    refused: dict[str, str]
    """What is left as it is, and why."""
    bytes_dense: int
    """Weight files that are read."""
    output_bytes: int
    """Weight files that would be written; an estimate when any site's `kept_share` is below 1."""
    offloaded: bool = False
    """Whether weights would stay on disk while nobody computes with them."""
    peak_memory_bytes: int
    """Beside the interpreter where no machine was given."""
    operations: float
    """Multiplications and additions of compression."""
    estimated_seconds: float | None = None
    """Of compression on the machine that was given; text, evaluation and saving come on top."""
    warnings: tuple[str, ...]


def make_plan(
    source: Source,
    recipe: Recipe,
    model_map: ModelMap | None = None,
    *,
    offload: Offload = "auto",
    machine: Machine | None = None,
    checked: Preflight | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Check everything that can be checked before any work, and foretell the rest; seconds for `machine` only.

    Many plans for one model share its map and what its preflight found.

    Raises: CompressError for whatever `compress` would refuse in this model or recipe, all sites at once.
    """
    checked = checked or preflight(source, trust_remote_code=recipe.trust_remote_code, progress=progress)
    offloaded = must_offload(offload, recipe.passes, weight_bytes=checked.bytes_weights)
    model_map = model_map or probe(checked.config, unfuse=True)
    loader = loader_of(checked.config)
    notes = check_recipe(recipe, model_map, loader)
    schemes = planned_schemes(recipe, model_map)
    dtype = storage_dtype_of(recipe, checked)
    layouts = (
        {}
        if recipe.save.format in ("plain", "llmcompress")
        else _layouts(schemes, model_map, loader, recipe.save.zero_points)
    )
    wanted = recipe.save.format
    by_manifest = wanted == "llmcompress" or (wanted == "auto" and bool(speechless(schemes, dtype)))

    tensors = _other_tensors(checked, model_map, dtype)
    sites, removed = [], 0
    for block in model_map.blocks:
        for site in block.structure.sites:
            name = block.full(site.name)
            write = _packed if by_manifest and name in schemes else _stored
            stored = write(site, schemes.get(name), layouts.get(name), dtype)
            tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
            weight_bytes = sum(_bytes(*tensor) for part, tensor in stored.items() if part != "bias")
            share = prod(each.kept_share(name, site, model_map) for each in recipe.passes if each.selects(name))
            total = sum(_bytes(*tensor) for tensor in stored.values())
            removed += round(total * (1 - share))
            sites.append(
                PlannedSite(
                    site=name,
                    passes=tuple(PASSES.name_of(type(each)) for each in recipe.passes if each.selects(name)),
                    scheme=schemes[name].name if name in schemes else None,
                    bits_per_weight=8 * share * weight_bytes / (site.outputs * site.inputs),
                    bytes=round(total * share),
                    kept_share=share,
                )
            )
    taken = cost(
        recipe,
        model_map,
        parameters=sum(prod(shape) for shape in checked.contents.shapes.values()),
        vocabulary=checked.contents.embedding_rows,
        offloaded=offloaded,
    )
    return Plan(
        model=source.name,
        family=model_map.family,
        sites=tuple(sites),
        refused=refused(model_map),
        bytes_dense=checked.bytes_weights,
        output_bytes=_file_bytes(tensors) - removed,
        offloaded=offloaded,
        peak_memory_bytes=taken.peak_bytes + (machine.process_bytes if machine else 0),
        operations=taken.operations,
        estimated_seconds=taken.operations / machine.operations_per_second if machine else None,
        warnings=tuple(dict.fromkeys([*checked.warnings, *notes])),
    )


def check_recipe(recipe: Recipe, model_map: ModelMap, loader: Loader) -> list[str]:
    """Whether every word of the recipe makes sense for this model; what the user should know about the result.

    Raises: CompressError for globs that match nothing, passes that undo each other, groups that do not divide, and
    schemes that the format asked for cannot hold.
    """
    passes = [each.for_model(model_map) for each in recipe.passes]
    check_sites(passes, model_map.site_names())
    check_order(passes, model_map.site_names())
    for each in recipe.passes:
        each.check_packages()
    for each in stages(recipe.passes)[0].passes:
        each.check(model_map)
    schemes = planned_schemes(recipe, model_map)
    return check_format(recipe.save.format, model_map, schemes, loader, recipe.save.zero_points)


def planned_schemes(recipe: Recipe, model_map: ModelMap) -> dict[str, Scheme]:
    """Full name → scheme of every site that will hold codes, on the model as it is now.

    Once a pass changes what the linears are, sizes are others and are asked again when the later stage begins.
    Raises: CompressError listing every site of the first stages whose inputs do not divide into groups.
    """
    cut = stages(recipe.passes)
    first = next((stage.index for stage in cut if stage.changes_sites), len(cut))
    schemes = site_schemes([each for stage in cut if stage.index <= first for each in stage.passes], model_map)
    for stage in cut[first + 1 :]:
        with suppress(CompressError):
            schemes |= site_schemes(stage.passes, model_map)
    return schemes


def storage_dtype_of(recipe: Recipe, checked: Preflight) -> torch.dtype:
    """The type of scales and of all that stays dense in the files written."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return named.get(recipe.save.dtype, checked.storage_dtype)


def refused(model_map: ModelMap) -> dict[str, str]:
    """Full name → reason of everything that no pass may touch, blocks and all."""
    inside = {block.full(row.name): row.reason for block in model_map.blocks for row in block.structure.refused}
    return {row.name: row.reason for row in model_map.refused} | inside


def _layouts(
    schemes: Mapping[str, Scheme], model_map: ModelMap, loader: Loader, zero_points: ZeroPoints
) -> dict[str, Layout]:
    """How codes are stored, without the sites that compressed-tensors cannot hold: those are saved multiplied out."""
    if speechless(schemes, None):
        return {}
    dense = {row.site for row in unsupported(model_map, schemes, loader)}
    planned = planned_sites(model_map, schemes, loader, zero_points)
    return {name: site.layout for name, site in planned.items() if name not in dense}


def _other_tensors(checked: Preflight, model_map: ModelMap, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, Shape]]:
    """Everything but the sites: embedding, norms, head, what was refused."""
    names = model_map.site_names()
    sites = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    shapes = checked.contents.shapes
    holders = {name.rpartition(".")[0] + "." for name, shape in shapes.items() if len(shape) == 3}
    apart = tuple(holder for holder in holders if any(name.startswith(holder) for name in names))  # banks as linears
    return {name: (dtype, shape) for name, shape in shapes.items() if name not in sites and not name.startswith(apart)}


def _stored(
    site: SiteInfo, scheme: Scheme | None, layout: Layout | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, Shape]]:
    """The tensors of one site in the file, as `export.compressed_tensors` writes them."""
    outputs, inputs = site.outputs, site.inputs
    tensors: dict[str, tuple[torch.dtype, Shape]] = {"bias": (dtype, (outputs,))} if site.has_bias else {}
    if scheme is None or layout is None:
        return {"weight": (dtype, (outputs, inputs)), **tensors}
    grid = scheme.weights
    rows, groups = grid.scale_shape(outputs, inputs)
    tensors["weight_scale"] = (_scale_dtype(grid.scales, dtype), (1,) if grid.scales.single else (rows, groups))
    if grid.scales.shared_bits:
        tensors["weight_global_scale"] = (torch.float32, (1,))
    if layout.packs_floats:
        tensors["weight_packed"] = (torch.uint8, (outputs, packed_bytes(inputs, grid.bits)))
    elif layout.format == "pack-quantized":
        tensors["weight_packed"] = (torch.int32, (outputs, -(-inputs * layout.bits // 32)))
        tensors["weight_shape"] = (torch.int64, (2,))
    else:
        tensors["weight"] = (torch.int8 if grid.number is None else torch.float8_e4m3fn, (outputs, inputs))
    if layout.packs_zero_points:
        tensors["weight_zero_point"] = (torch.int32, (-(-outputs * layout.bits // 32), groups))
    elif not layout.symmetric:
        tensors["weight_zero_point"] = (torch.int8, (outputs, groups))
    if scheme.activations == "tensor":
        tensors["input_scale"] = (dtype, (1,))
    elif scheme.measures_inputs:
        tensors["input_global_scale"] = (torch.float32, (1,))
    return tensors


def _packed(
    site: SiteInfo, scheme: Scheme | None, _: Layout | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, Shape]]:
    """The same as `modules.packed` writes them, for our manifest."""
    assert scheme is not None
    grid, shape = scheme.weights, scheme.weights.scale_shape(site.outputs, site.inputs)
    tensors: dict[str, tuple[torch.dtype, Shape]] = {"bias": (dtype, (site.outputs,))} if site.has_bias else {}
    size = (site.outputs, packed_bytes(site.inputs, grid.bits))
    tensors["weight"] = (torch.uint8, (prod(size),) if grid.bits == 8 else size)
    tensors["scale"] = (dtype if grid.scales.bits is None else torch.uint8, shape)
    if not grid.symmetric:
        tensors["zero_point"] = (torch.int8, shape)
    if grid.scales.shared_bits:
        tensors["shared_scale"] = (torch.int32, (1,))
    if scheme.measures_inputs:
        tensors["input_scale"] = (dtype if scheme.activations == "tensor" else torch.int32, (1,))
    return tensors


def _scale_dtype(kind: ScaleKind, dtype: torch.dtype) -> torch.dtype:
    """Of scales in a compressed-tensors folder."""
    return {POWER_OF_TWO: torch.uint8, TWO_LEVEL: torch.float8_e4m3fn}.get(kind, dtype)


def _bytes(dtype: torch.dtype, shape: Shape) -> int:
    return prod(shape) * dtype.itemsize


def _file_bytes(tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> int:
    """Size of one safetensors file with these tensors, its header included."""
    header, _ = write_header(tensors)
    return len(header) + sum(_bytes(*tensor) for tensor in tensors.values())
