"""The plan of a run, from the recipe, config.json and safetensors headers: no weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PretrainedConfig

from llmcompress.calibration.sources import check_source
from llmcompress.cost import Machine, Offload, cost, must_offload
from llmcompress.errors import CompressError
from llmcompress.exporters.choose import Choice, choose, export_notes, limits_of
from llmcompress.exporters.contents import CodedLinear, planned_contents
from llmcompress.exporters.dense_tables import bytes_of, dense_tables
from llmcompress.exporters.loader import Loader
from llmcompress.formats import plain
from llmcompress.formats.named import Kind
from llmcompress.known_model import KnownModel, known_model, size_of
from llmcompress.loading.preflight import ModelFacts
from llmcompress.loading.source import IN_MEMORY, Source
from llmcompress.loading.tensors import write_header
from llmcompress.model.map import ModelMap
from llmcompress.model.residual_probe import check_residual
from llmcompress.modules.scheme import Scheme
from llmcompress.passes.apply import stages
from llmcompress.passes.base import PASSES, Pass
from llmcompress.passes.quantization.target_limits import within_limits
from llmcompress.passes.schemes import site_schemes, with_fitted_schemes
from llmcompress.recipe.model import Recipe, Save
from llmcompress.recipe.order import check_order, check_sites


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlannedSite(_Row):
    """The plan for one linear."""

    site: str
    passes: tuple[str, ...]
    """Names of the passes that work on it, in order."""
    scheme: str | None
    """None: it is kept dense."""
    bits_per_weight: float
    """Bits on disk ÷ weights of the dense site: codes, scales and zero points, or the dense type."""
    bytes: int
    """On disk, its bias included."""
    kept_fraction: float = 1.0
    """Fraction of its parameters kept after pruning or decomposition; an estimate where data decide."""


class Plan(_Row):
    """The plan of a run."""

    model: str
    family: str
    sites: tuple[PlannedSite, ...]
    refused: dict[str, str]
    """Modules that are not compressed, and why."""
    bytes_dense: int
    """Weight files that are read."""
    output_bytes: int
    """Weight files that would be written; an estimate when any site's `kept_fraction` is below 1."""
    offloaded: bool = False
    """Whether weights would be offloaded to disk."""
    peak_memory_bytes: int
    """Without the interpreter if no machine was given."""
    operations: float
    """Multiplications and additions of compression."""
    estimated_seconds: float | None = None
    """Of compression on the machine that was given; text, evaluation and saving come on top."""
    probed_blocks: tuple[int, ...] = ()
    """Blocks that were compressed to find these seconds; none: from operations alone, right within a factor of two."""
    evaluation_seconds: float | None = None
    """Of measuring the dense and the compressed model there; None too where the length of a text is not known."""
    license: str
    """That of the dense model, and what it says of publishing the result."""
    publishes: tuple[str, ...] = ()
    """Repositories on the Hub that the recipe publishes to."""
    warnings: tuple[str, ...]


def make_plan(
    model: Source | KnownModel, recipe: Recipe, *, offload: Offload = "auto", machine: Machine | None = None
) -> Plan:
    """Check everything that can be checked before any work, and estimate the rest; seconds for `machine` only.

    For a `KnownModel` this is arithmetic alone, some milliseconds, unless a pass rotates the residual stream: no file
    of the model is opened.

    Raises: CompressError for anything that `compress` would refuse in this model or recipe, all sites at once.
    """
    check_texts(recipe, given=recipe.calibration.source.startswith(IN_MEMORY))
    known = known_model(model, trust_remote_code=recipe.trust_remote_code) if isinstance(model, Source) else model
    checked, model_map = known.checked, known.map
    recipe, offloaded = with_weights_placed(recipe, offload, weight_bytes=checked.bytes_weights)
    dtype = storage_dtype_of(recipe.save, checked)
    stored = check_recipe(recipe, model_map, known.loader, dtype)
    check_stream(recipe, checked.config)
    sites = _sites(recipe, model_map, stored, dtype)
    tensors = tensors_outside_sites(checked, model_map, dtype)
    for each in recipe.passes:
        tensors = each.tensors_outside(tensors, model_map, dtype)
    taken = cost(recipe, model_map, size_of(checked), offloaded=offloaded)
    evaluating = taken.evaluation_operations
    tensors |= {f"{row.name}.{part}": kind for row in sites for part, kind in row.tensors.items()}
    return Plan(
        model=known.name,
        family=model_map.family,
        sites=tuple(row.planned() for row in sites),
        refused=refused(model_map, rounded=_rounded_tables(recipe, model_map)),
        bytes_dense=checked.bytes_weights,
        output_bytes=_file_bytes(tensors) - sum(row.removed for row in sites),
        offloaded=offloaded,
        peak_memory_bytes=taken.peak_bytes + (machine.process_bytes + known.process_bytes if machine else 0),
        operations=taken.operations + taken.head_operations + taken.lowered_operations,
        estimated_seconds=machine.seconds(taken) if machine else None,
        evaluation_seconds=evaluating / machine.operations_per_second if machine and evaluating is not None else None,
        license=known.license.note,
        publishes=tuple(str(each.repository) for each in recipe.publish),
        warnings=tuple(dict.fromkeys([*checked.warnings, *stored.notes])),
    )


def check_texts(recipe: Recipe, *, given: bool = False) -> None:
    """That every text which the recipe names on this computer is there; nothing of it is read.

    `given`: the calibration data are in memory.

    Raises: CompressError for a file or a bundled text that does not exist.
    """
    if not given and any(each.uses_data() for each in recipe.passes) and recipe.calibration.source != "self":
        check_source(recipe.calibration.source, where="calibration.source")
    for source, where in (each for settings in recipe.evaluate for each in settings.sources()):
        check_source(source, where=where)


def check_recipe(
    recipe: Recipe, model_map: ModelMap, loader: Loader, storage_dtype: torch.dtype | None = None
) -> Choice:
    """Check the recipe against this model; returns how the result will be stored.

    `storage_dtype` None: not known yet.

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
    notes = [note for each in _on_this_model(recipe.passes) for note in each.notes(model_map)]
    contents = planned_contents(model_map, planned_schemes(recipe, model_map), loader, storage_dtype)
    ours = tuple(PASSES.name_of(type(each)) for each in recipe.passes if each.needs_plugin())
    contents = replace(contents, planned_modules=ours)
    table = next((scheme for each in recipe.passes if (scheme := each.rounds_embedding()) is not None), None)
    if table is not None:
        sizes = model_map.vocabulary, model_map.hidden_size
        contents = replace(contents, rounded_embedding=CodedLinear(model_map.embedding, table, *sizes))
    choice = choose(recipe.save.format, contents, zero_points=recipe.save.zero_points)
    notes += [note for exporter in recipe.export for note in export_notes(exporter, contents)]
    dtype = storage_dtype or torch.bfloat16
    return replace(choice, notes=tuple(dict.fromkeys([*notes, *choice.notes, *dense_tables(choice, model_map, dtype)])))


def check_stream(recipe: Recipe, config: PretrainedConfig) -> None:
    """That the residual stream can be rotated, where a pass does that.

    Raises: CompressError, naming the module, where a change of basis could not be exact.
    """
    if any(each.rotates_stream() for each in recipe.passes):
        check_residual(config)


def fitted_to_model(recipe: Recipe, model_map: ModelMap) -> Recipe:
    """The same recipe with the schemes written out that `on_indivisible: fit` finds for this model."""
    first = _on_this_model(recipe.passes)
    fitted = [with_fitted_schemes(each, model_map) for each in first]
    return recipe.model_copy(update={"passes": (*fitted, *recipe.passes[len(first) :])})


def _on_this_model(passes: Sequence[Pass]) -> list[Pass]:
    """The passes up to the first that leaves other linears: whatever the map says of sizes holds for them."""
    cut = stages(passes)
    first = next((stage.index for stage in cut if stage.changes_sites), len(cut))
    return [each for stage in cut if stage.index <= first for each in stage.passes]


def within_target_limits(recipe: Recipe) -> Recipe:
    """The same recipe, with quantizers that respect the limits of the named targets from the start.

    Optional passes (`required: false`) that a target cannot hold are left out; `save.format: auto` holds whatever the
    exports hold.
    """
    limits, passes = limits_of(recipe.save.format), recipe.passes
    targets = [exporter.limits for exporter in recipe.export]
    for target in (limits, *targets):
        passes = tuple(within_limits(each, target) for each in passes)
    limited = recipe.model_copy(update={"passes": passes})
    named = targets if recipe.save.format == "auto" else [limits, *targets]
    return limited if named and all(each.rounded_embedding for each in named) else _without_optional(limited)


def with_weights_placed(
    recipe: Recipe, offload: Offload, *, weight_bytes: int, processes: int = 1
) -> tuple[Recipe, bool]:
    """Whether weights stay on disk, and the recipe: a pass that is not required does not keep them in memory.

    Raises: CompressError as `must_offload` does.
    """
    lean = _without_optional(recipe)
    on_disk = must_offload(offload, lean.passes, weight_bytes=weight_bytes, processes=processes)
    return lean if on_disk or processes > 1 else recipe, on_disk


def _without_optional(recipe: Recipe) -> Recipe:
    kept = tuple(each for each in recipe.passes if not each.is_optional())
    return recipe.model_copy(update={"passes": kept}) if kept else recipe


def planned_schemes(recipe: Recipe, model_map: ModelMap) -> dict[str, Scheme]:
    """Full name → scheme of every site that will hold codes, on the model as it is now.

    Once a pass changes what the linears are, sizes are others and are asked again when the later stage begins.
    Raises: CompressError listing every site of the first stages whose inputs do not divide into groups.
    """
    first = _on_this_model(recipe.passes)
    schemes = site_schemes(first, model_map)
    for each in recipe.passes[len(first) :]:
        with suppress(CompressError):
            schemes |= site_schemes([each], model_map)
    return schemes


def storage_dtype_of(save: Save, checked: ModelFacts) -> torch.dtype:
    """The dtype of scales and dense tensors in the saved files."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return named.get(save.dtype, checked.storage_dtype)


def refused(model_map: ModelMap, *, rounded: Collection[str] = ()) -> dict[str, str]:
    """Full name → reason of everything that stays as it is, without the tables that a pass rounds."""
    inside = {block.full(row.name): row.reason for block in model_map.blocks for row in block.structure.refused}
    return {row.name: row.reason for row in model_map.refused if row.name not in rounded} | inside


def _rounded_tables(recipe: Recipe, model_map: ModelMap) -> set[str]:
    if not any(each.rounds_embedding() for each in recipe.passes):
        return set()
    return {model_map.embedding, model_map.head} if model_map.tied else {model_map.embedding}


@dataclass(frozen=True)
class _SiteTensors:
    """A site, and what the file will hold of it before anything is taken away."""

    name: str
    weights: int
    passes: tuple[str, ...]
    scheme: Scheme | None
    tensors: dict[str, Kind]
    kept_fraction: float

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(bytes_of(kind) for kind in self.tensors.values())

    @property
    def removed(self) -> int:
        """Bytes that pruning or decomposition takes away."""
        return round(self.bytes * (1 - self.kept_fraction))

    def planned(self) -> PlannedSite:
        """The row of the plan."""
        weight_bytes = sum(bytes_of(kind) for part, kind in self.tensors.items() if not part.endswith("bias"))
        return PlannedSite(
            site=self.name,
            passes=self.passes,
            scheme=self.scheme.name if self.scheme else None,
            bits_per_weight=8 * self.kept_fraction * weight_bytes / self.weights,
            bytes=round(self.bytes * self.kept_fraction),
            kept_fraction=self.kept_fraction,
        )


def _sites(recipe: Recipe, model_map: ModelMap, stored: Choice, dtype: torch.dtype) -> list[_SiteTensors]:
    coded = {site.name: site for site in stored.contents.sites}
    found = []
    for block in model_map.blocks:
        for site in block.structure.sites:
            name = block.full(site.name)
            passes = [each for each in recipe.passes if each.selects(name)]
            dense = plain.tensors((site.outputs, site.inputs), dtype, bias=site.has_bias)
            tensors = stored.tensors(coded[name], dtype) if name in coded else dense
            for each in passes:
                tensors = each.site_tensors(name, site, tensors, dtype)
            found.append(
                _SiteTensors(
                    name,
                    site.outputs * site.inputs,
                    tuple(PASSES.name_of(type(each)) for each in passes),
                    coded[name].scheme if name in coded else None,
                    tensors,
                    prod(each.kept_fraction(name, site, model_map) for each in passes),
                )
            )
    return found


def tensors_outside_sites(checked: ModelFacts, model_map: ModelMap, dtype: torch.dtype) -> dict[str, Kind]:
    """Everything but the sites: embedding, norms, head, what was refused."""
    names = model_map.site_names()
    sites = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    shapes = checked.contents.shapes
    holders = {name.rpartition(".")[0] + "." for name, shape in shapes.items() if len(shape) == 3}
    apart = tuple(holder for holder in holders if any(name.startswith(holder) for name in names))  # banks as linears
    return {name: (dtype, shape) for name, shape in shapes.items() if name not in sites and not name.startswith(apart)}


def _file_bytes(tensors: Mapping[str, Kind]) -> int:
    """Size of one safetensors file with these tensors, its header included."""
    header, _ = write_header(tensors)
    return len(header) + sum(bytes_of(kind) for kind in tensors.values())
