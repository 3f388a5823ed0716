"""Which saved format holds which sites, decided before any work; and what a saver returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.formats import E2M1, E4M3, POWER_OF_TWO, SINGLE, STORED, TWO_LEVEL, NumberFormat, ScaleKind

Format = Literal["auto", "compressed-tensors", "plain", "llmcompress"]

ZeroPoints = Literal["folded", "packed"]
"""Of 2- and 4-bit asymmetric grids. Folded: subtracted from the codes, which then need a wider field but load anywhere;
packed: the format's own way, which transformers 5 with compressed-tensors 0.18 to 0.20 only loads when asked to
dequantize."""


@dataclass(frozen=True)
class Loader:
    """What stock transformers makes of a model's configuration (see `checkpoint.loader_of`)."""

    merges_experts: bool = False
    """It joins experts of the checkpoint into banks, and loads no compressed-tensors folder then."""
    subclassed: frozenset[str] = frozenset()
    """Linears of a class derived from `nn.Linear`, which version 5 cannot load packed."""


@dataclass(frozen=True)
class Saved:
    """What a saver wrote."""

    weight_files: tuple[str, ...]
    tensor_bytes: int
    format: str
    """`compressed-tensors` or `plain`."""
    dense_sites: dict[str, str] = field(default_factory=dict)
    """Quantized sites that were multiplied out, and why."""


LayoutName = Literal[
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
]

_FLOATS: dict[tuple[NumberFormat, ScaleKind], LayoutName] = {
    (E4M3, STORED): "float-quantized",
    (E4M3, SINGLE): "float-quantized",
    (E4M3, POWER_OF_TWO): "mxfp8-quantized",
    (E2M1, POWER_OF_TWO): "mxfp4-pack-quantized",
    (E2M1, TWO_LEVEL): "nvfp4-pack-quantized",
}
"""Floats that the format has words for."""


@dataclass(frozen=True)
class Layout:
    """How compressed-tensors stores a scheme's codes: `format` is the library's name, `bits` the width of a field."""

    format: LayoutName
    bits: int
    """Bits of the grid as the loader sees it; unpacked formats spend a whole byte on it."""
    symmetric: bool
    """False: zero points are stored; True for an asymmetric scheme: they are subtracted from the codes."""

    @property
    def packs_zero_points(self) -> bool:
        """Zero points share int32 words like codes do; otherwise each takes a byte."""
        return self.format == "pack-quantized" and not self.symmetric

    @property
    def packs_floats(self) -> bool:
        """Two 4-bit floats share a byte."""
        return self.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")

    @property
    def bits_on_disk(self) -> int:
        """Stored bits per code."""
        return self.bits if self.format == "pack-quantized" or self.packs_floats else 8


def layout_on_disk(scheme: Scheme, *, packable: bool = True, zero_points: ZeroPoints = "folded") -> Layout:
    """The layout that every supported version of transformers and compressed-tensors reads alike (unless `packed`).

    Measured (docs/decisions/0004-saved-formats.md): only 2, 4 and 8 bits are packed the same way by all versions, and
    transformers 5 cannot load packed zero points. Code minus zero point needs one bit more and no zero point.
    `packable` is False where loaders build a subclass of `nn.Linear` (Falcon): 5 fails on its missing `weight`.
    """
    grid = scheme.weights
    if grid.number is not None:
        return Layout(_FLOATS[grid.number, grid.scales], grid.bits, symmetric=True)
    if scheme.activations:
        return Layout("int-quantized", grid.bits, grid.symmetric)
    if zero_points == "packed" and packable and not grid.symmetric and grid.bits in (2, 4):
        return Layout("pack-quantized", grid.bits, symmetric=False)
    needed = grid.bits if grid.symmetric else grid.bits + 1
    if needed > 8 or not packable:
        return Layout("naive-quantized", grid.bits, grid.symmetric)
    return Layout("pack-quantized", next(width for width in (2, 4, 8) if width >= needed), symmetric=True)


def speechless(schemes: Mapping[str, Scheme], storage_dtype: torch.dtype | None) -> dict[str, str]:
    """Site → why `auto` takes our manifest for the whole model instead of compressed-tensors.

    `storage_dtype` None: not known yet.
    """
    found = {}
    for site, scheme in schemes.items():
        if not _has_words(scheme):
            found[site] = f"compressed-tensors has no word for {scheme.name}"
        elif scheme.activations == "group" and scheme.measures_inputs:
            found[site] = f"transformers 4 and 5 round the inputs of {scheme.name} differently"
        elif _only_bfloat16(scheme) and storage_dtype not in (None, torch.bfloat16):
            kind = str(storage_dtype).removeprefix("torch.")
            found[site] = f"stock loaders restore {scheme.name} to bfloat16 alone, and these weights are {kind}"
    return found


def _has_words(scheme: Scheme) -> bool:
    """Whether compressed-tensors can name a scheme at all."""
    number = scheme.weights.number
    return number is None or (number, scheme.weights.scales) in _FLOATS


def _only_bfloat16(scheme: Scheme) -> bool:
    """MX and NVFP4: the library's decompressors know no other dtype, whatever the model's is."""
    return scheme.weights.scales.bits is not None


@dataclass(frozen=True)
class PlannedSite:
    """A site as a saver sees it."""

    name: str
    scheme: Scheme
    inputs: int
    is_linear: bool = True
    """Loaders build an `nn.Linear` there, not a Conv1D."""
    packable: bool = True
    """And no subclass of it."""
    zero_points: ZeroPoints = "folded"

    @property
    def layout(self) -> Layout:
        """How its codes are stored."""
        return layout_on_disk(self.scheme, packable=self.packable, zero_points=self.zero_points)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None when a row is one group."""
        group = self.scheme.weights.group
        return group if group is not None and group <= self.inputs else None


_EXPERTS = "experts"


@dataclass(frozen=True)
class Unsupported:
    """A site that compressed-tensors cannot hold."""

    site: str
    reason: str
    dense_instead: bool
    """Whether it can be saved multiplied out; rounded activations cannot."""

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}"


def planned_sites(
    model_map: ModelMap, schemes: Mapping[str, Scheme], loader: Loader, zero_points: ZeroPoints
) -> dict[str, PlannedSite]:
    """How compressed-tensors would hold each site; `schemes` says how each (full name) will be quantized."""
    found = {}
    for block in model_map.blocks:
        for site in block.structure.sites:
            name = block.full(site.name)
            if name in schemes:
                packable = name not in loader.subclassed
                found[name] = PlannedSite(name, schemes[name], site.inputs, not site.transposed, packable, zero_points)
    return found


def unsupported(model_map: ModelMap, schemes: Mapping[str, Scheme], loader: Loader | None = None) -> list[Unsupported]:
    """Sites that compressed-tensors cannot hold; `schemes` says how each site (full name) will be quantized."""
    loader = loader or Loader()
    planned = planned_sites(model_map, schemes, loader, "folded")
    return problems(planned.values(), merged_on_load=loader.merges_experts, linears=model_map.site_names())


def problems(sites: Iterable[PlannedSite], *, merged_on_load: bool, linears: Iterable[str] = ()) -> list[Unsupported]:
    """Which of all quantized sites compressed-tensors cannot hold, and why; `linears` names all, dense ones too."""
    sites = list(sites)
    # transformers 5 recognises experts by this word too, and reads all of them with the scheme of the first
    experts = [site for site in sites if _EXPERTS in site.name]
    mixed = len({(site.layout, site.group, site.scheme.activations) for site in experts}) > 1
    restored = [site.name for site in experts if not mixed and _is_restored(site)]
    if restored and set(restored) == {name for name in linears if _EXPERTS in name}:
        merged_on_load = False  # banks of codes load as well
    found = []
    for site in sites:
        reason = _problem(site, merged_on_load)
        if reason is None and mixed and site in experts:
            reason = "transformers 5 reads all experts with one scheme, and these have several"
        if reason:
            found.append(Unsupported(site.name, reason, dense_instead=site.scheme.activations is None))
    return found


def _is_restored(site: PlannedSite) -> bool:
    """Whether transformers 5 makes part of a bank of it."""
    whole = site.layout.format in ("pack-quantized", "float-quantized") and site.scheme.activations is None
    return whole and _problem(site, merged_on_load=False) is None


def _problem(site: PlannedSite, merged_on_load: bool) -> str | None:
    if merged_on_load:
        return "transformers 5 loads no compressed-tensors model unless all experts are integers or fp8 of one scheme"
    if site.layout.packs_floats and not site.packable:
        return "transformers 5 loads no packed codes into a subclass of nn.Linear"
    if not site.is_linear:
        return "compressed-tensors replaces only nn.Linear, and this is a Conv1D"
    if site.group and site.inputs % site.group:
        return (
            f"{site.inputs} inputs do not divide into groups of {site.group}, "
            "and compressed-tensors has no shorter last group"
        )
    return None


def check_format(
    wanted: Format,
    model_map: ModelMap,
    schemes: Mapping[str, Scheme],
    loader: Loader | None = None,
    zero_points: ZeroPoints = "folded",
) -> list[str]:
    """Before any work: what the user should know about how the result will be stored, one line each.

    Raises: CompressError when `wanted` cannot hold the result.
    """
    if wanted == "plain":
        rounded = sorted(name for name, scheme in schemes.items() if scheme.activations)
        if rounded:
            raise _refusal("a plain folder cannot round activations", rounded, "set `save.format` to auto")
        return []
    if wanted == "llmcompress":
        return ["codes lie at their own width, and the folder loads after `import llmcompress` only"] if schemes else []
    wordless = [name for name, scheme in schemes.items() if not _has_words(scheme)]
    if wordless and wanted == "compressed-tensors":
        names = [f"{name}: {schemes[name].name}" for name in wordless]
        raise _refusal("compressed-tensors has no word for some schemes", names, "set `save.format` to auto or plain")
    reasons = dict.fromkeys(speechless(schemes, None).values())
    if reasons and wanted == "auto":
        ending = "the whole model is saved with our manifest and loads after `import llmcompress`"
        return [f"{reason}; {ending}" for reason in reasons]
    found = unsupported(model_map, schemes, loader)
    blocking = [each for each in found if wanted == "compressed-tensors" or not each.dense_instead]
    if blocking:
        raise _refusal(
            f"compressed-tensors cannot hold {len(blocking)} of {len(schemes)} sites",
            [str(problem) for problem in blocking],
            "use a group length that divides the inputs, one scale per channel, or leave the sites out with `exclude`",
        )
    coded = planned_sites(model_map, schemes, loader or Loader(), zero_points)
    for problem in found:
        del coded[problem.site]
    notes = [f"{problem}; saved multiplied out to ordinary weights" for problem in found]
    return notes + list(dict.fromkeys(note for site in coded.values() if (note := _layout_note(site))))


def _layout_note(site: PlannedSite) -> str | None:
    """What a user would be surprised by."""
    scheme, layout = site.scheme, site.layout
    if _only_bfloat16(scheme):
        return f"{scheme.name}: stock loaders give bfloat16 weights; with another `save.dtype` it is our manifest"
    if layout.packs_zero_points:
        return (
            f"{scheme.name}: zero points are packed; transformers 5 with compressed-tensors 0.18 to 0.20 loads them "
            "only with `quantization_config=CompressedTensorsConfig(dequantize=True)`"
        )
    if layout.bits_on_disk == scheme.weights.bits:
        return None
    field = f"{layout.bits_on_disk}-bit fields, the narrowest that all supported loaders read"
    note = f"{scheme.name}: codes are stored in {field}"
    if scheme.weights.symmetric or scheme.weights.bits == 3:
        return f"{note}; `save.format: llmcompress` keeps their own width"
    return f"{note} (see `save.zero_points`)"


def _refusal(what: str, lines: list[str], fix: str) -> CompressError:
    where = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
    return CompressError("save.format", what, where=where, fix=fix, exit_code=ExitCode.USAGE)
