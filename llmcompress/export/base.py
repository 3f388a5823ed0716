"""Which saved format holds which sites, decided before any work; and what a saver returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.modules.scheme import Scheme

Format = Literal["auto", "compressed-tensors", "plain"]


@dataclass(frozen=True)
class Saved:
    """What a saver wrote."""

    weight_files: tuple[str, ...]
    tensor_bytes: int
    format: str
    """`compressed-tensors` or `plain`."""
    dense_sites: dict[str, str] = field(default_factory=dict)
    """Quantized sites that were multiplied out, and why."""


@dataclass(frozen=True)
class Layout:
    """How compressed-tensors stores a scheme's codes: `format` is the library's name, `bits` the width of a field."""

    format: Literal["pack-quantized", "int-quantized", "naive-quantized"]
    bits: int
    """Bits of the grid as the loader sees it; unpacked formats spend a whole byte on it."""
    symmetric: bool
    """False: zero points are stored; True for an asymmetric scheme: they are subtracted from the codes."""

    @property
    def bits_on_disk(self) -> int:
        """Stored bits per code."""
        return self.bits if self.format == "pack-quantized" else 8


def layout_on_disk(scheme: Scheme, *, packable: bool = True) -> Layout:
    """The layout that every supported version of transformers and compressed-tensors reads alike.

    Measured (docs/decisions/0004-saved-formats.md): only 2, 4 and 8 bits are packed the same way by all versions, and
    transformers 5 cannot load packed zero points. Code minus zero point needs one bit more and no zero point.
    `packable` is False where loaders build a subclass of `nn.Linear` (Falcon): 5 fails on its missing `weight`.
    """
    grid = scheme.weights
    if scheme.activations:
        return Layout("int-quantized", grid.bits, grid.symmetric)
    needed = grid.bits if grid.symmetric else grid.bits + 1
    if needed > 8 or not packable:
        return Layout("naive-quantized", grid.bits, grid.symmetric)
    return Layout("pack-quantized", next(width for width in (2, 4, 8) if width >= needed), symmetric=True)


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

    @property
    def layout(self) -> Layout:
        """How its codes are stored."""
        return layout_on_disk(self.scheme, packable=self.packable)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None when a row is one group."""
        group = self.scheme.weights.group
        return group if group is not None and group <= self.inputs else None


@dataclass(frozen=True)
class Unsupported:
    """A site that compressed-tensors cannot hold."""

    site: str
    reason: str
    dense_instead: bool
    """Whether it can be saved multiplied out; rounded activations cannot."""

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}"


def unsupported(
    model_map: ModelMap, schemes: Mapping[str, Scheme], *, merged_on_load: bool = False
) -> list[Unsupported]:
    """Sites that compressed-tensors cannot hold; `schemes` says how each site (full name) will be quantized.

    `merged_on_load`: what `checkpoint.merges_on_load` says of the model.
    """
    planned = [
        PlannedSite(block.full(site.name), schemes[block.full(site.name)], site.inputs, not site.transposed)
        for block in model_map.blocks
        for site in block.structure.sites
        if block.full(site.name) in schemes
    ]
    return problems(planned, merged_on_load=merged_on_load)


def problems(sites: Iterable[PlannedSite], *, merged_on_load: bool) -> list[Unsupported]:
    """Which of all quantized sites of a model compressed-tensors cannot hold, and why."""
    sites = list(sites)
    # transformers 5 recognises experts by this word too, and reads all of them with the scheme of the first
    experts = [site for site in sites if "experts" in site.name]
    mixed = len({(site.layout, site.group, site.scheme.activations) for site in experts}) > 1
    found = []
    for site in sites:
        reason = _problem(site, merged_on_load)
        if reason is None and mixed and site in experts:
            reason = "transformers 5 reads all experts with one scheme, and these have several"
        if reason:
            found.append(Unsupported(site.name, reason, dense_instead=site.scheme.activations is None))
    return found


def _problem(site: PlannedSite, merged_on_load: bool) -> str | None:
    if merged_on_load:
        return "transformers 5 loads no compressed-tensors model whose expert banks are ordinary weights"
    if not site.is_linear:
        return "compressed-tensors replaces only nn.Linear, and this is a Conv1D"
    if site.group and site.inputs % site.group:
        return (
            f"{site.inputs} inputs do not divide into groups of {site.group}, "
            "and compressed-tensors has no shorter last group"
        )
    return None


def check_format(
    wanted: Format, model_map: ModelMap, schemes: Mapping[str, Scheme], *, merged_on_load: bool = False
) -> list[str]:
    """Before any work: what the user should know about how the result will be stored, one line each.

    Raises: CompressError when `wanted` cannot hold the result.
    """
    if wanted == "plain":
        rounded = sorted(name for name, scheme in schemes.items() if scheme.activations)
        if rounded:
            raise _refusal("a plain folder cannot round activations", rounded, "set `save.format` to auto")
        return []
    found = unsupported(model_map, schemes, merged_on_load=merged_on_load)
    blocking = [each for each in found if wanted == "compressed-tensors" or not each.dense_instead]
    if blocking:
        raise _refusal(
            f"compressed-tensors cannot hold {len(blocking)} of {len(schemes)} sites",
            [str(problem) for problem in blocking],
            "use a group length that divides the inputs, one scale per channel, or leave the sites out with `exclude`",
        )
    dense = [f"{problem}; saved multiplied out to ordinary weights" for problem in found]
    return dense + [note for scheme in dict.fromkeys(schemes.values()) if (note := _width_note(scheme))]


def _width_note(scheme: Scheme) -> str | None:
    stored = layout_on_disk(scheme).bits_on_disk
    if stored == scheme.weights.bits:
        return None
    return f"{scheme.name}: codes are stored in {stored}-bit fields, the narrowest that all supported loaders read"


def _refusal(what: str, lines: list[str], fix: str) -> CompressError:
    where = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
    return CompressError("save.format", what, where=where, fix=fix, exit_code=ExitCode.USAGE)
