"""What happens to sites whose inputs do not divide into the groups of their scheme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal, Protocol, runtime_checkable

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.passes.base import BlockPass, Pass

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A block or expert in a site's name: the error lists kinds of sites, not every one of thousands."""

OnIndivisible = Literal["error", "fit", "skip", "channel", "pad"]

SHORTEST_GROUP = 32
"""Of a group that is chosen and not asked for: kernels of runtimes take 32, 64, 128 or whole rows, and in shorter
groups 16-bit scales would weigh a bit per weight and more."""


@runtime_checkable
class HasScheme(Protocol):
    """A quantization pass with the overrides of one site applied."""

    @property
    def scheme(self) -> str | None:
        """Name of the scheme; None for a pass that only rounds when asked to."""

    @property
    def on_indivisible(self) -> OnIndivisible:
        """What to do with a site whose inputs do not divide."""

    def quantizes(self) -> bool:
        """Whether the sites hold codes afterwards."""


@dataclass(frozen=True)
class Indivisible:
    """A site that cannot have the requested scheme."""

    site: str
    inputs: int
    scheme: Scheme


def resolve_scheme(pass_for_site: HasScheme, site_name: str, inputs: int) -> Scheme | None:
    """The scheme a site gets: the one asked for, or what `on_indivisible` says instead (None: it stays dense).

    `fit` keeps the numbers and takes the longest group that divides, for K-quants what llama.cpp takes; `channel` takes
    one scale per row; `pad` keeps the scheme, and the last group is shorter, which a super-block cannot be.

    Raises: CompressError when the inputs do not divide and the pass says `error`.
    """
    if pass_for_site.scheme is None:
        return None
    scheme = named_scheme(pass_for_site.scheme)
    span, is_super_block = scheme.weights.span, scheme.weights.scales.super_block is not None
    if span is None or inputs % span == 0 or (pass_for_site.on_indivisible == "pad" and not is_super_block):
        return scheme
    if pass_for_site.on_indivisible == "skip":
        return None
    if scheme.activations != "group":
        if pass_for_site.on_indivisible == "fit":
            return fitting_scheme(scheme, inputs)
        if pass_for_site.on_indivisible == "channel":
            return scheme.with_group(None)
    raise indivisible_error([Indivisible(site_name, inputs, scheme)])


def fitting_scheme(scheme: Scheme, inputs: int) -> Scheme:
    """The scheme most like it that as many inputs divide into."""
    other = scheme.without_super_blocks() or scheme
    return other.with_group(fitting_group(other.weights.group or inputs, inputs))


def fitting_group(group: int, inputs: int) -> int | None:
    """The longest power of two up to `group` that divides the inputs; None, the whole row, below SHORTEST_GROUP."""
    powers = (1 << power for power in range(group.bit_length() - 1, 0, -1))
    return next((length for length in powers if length >= SHORTEST_GROUP and inputs % length == 0), None)


def site_schemes(passes: Iterable[Pass], model_map: ModelMap) -> dict[str, Scheme]:
    """Full name → scheme of every site that will hold codes when all passes are done.

    Raises: CompressError listing every site that does not divide, not only the first.
    """
    schemes: dict[str, Scheme] = {}
    problems: dict[str, Indivisible] = {}
    for each in passes:
        for name, inputs, chosen in _rounded_sites(each, model_map):
            found = _try(chosen, name, inputs, problems)
            if found and chosen.quantizes():
                schemes[name] = found
    if problems:
        raise indivisible_error(list(problems.values()))
    return schemes


def fitting_notes(passes: Iterable[Pass], model_map: ModelMap) -> list[str]:
    """One line for each scheme asked for that not all sites can have: which they get instead, by kinds of sites."""
    changed: dict[Scheme, dict[tuple[int, Scheme], dict[str, None]]] = {}
    for each in passes:
        for name, inputs, chosen in _rounded_sites(each, model_map):
            asked = named_scheme(str(chosen.scheme))
            found = resolve_scheme(chosen, name, inputs) if chosen.on_indivisible == "fit" else asked
            if found is not None and found != asked:
                kinds = changed.setdefault(asked, {}).setdefault((inputs, found), {})
                kinds[name.rpartition(".")[2]] = None
    return [
        f"{asked.name} does not divide all inputs: "
        + "; ".join(f"{', '.join(kinds)} ({inputs} inputs) get {found.name}" for (inputs, found), kinds in rows.items())
        for asked, rows in changed.items()
    ]


def with_fitted_schemes(each: Pass, model_map: ModelMap) -> Pass:
    """The same pass, whose options name what `on_indivisible: fit` found: a recipe then says what was done."""
    if not isinstance(each, BlockPass) or getattr(each, "on_indivisible", None) != "fit":
        return each
    if not {"scheme", "on_indivisible"} <= type(each).model_fields.keys():
        return each  # candidates are tried in any case, and the report names the one taken
    sites = {
        name: (str(chosen.scheme), resolve_scheme(chosen, name, inputs))
        for name, inputs, chosen in _rounded_sites(each, model_map)
    }
    kinds: dict[str, set[str]] = {}
    for name, (_, found) in sites.items():
        kinds.setdefault(f"*.{name.rpartition('.')[2]}", set()).add(found.name if found else "")
    changed: dict[str, dict[str, str]] = {}
    for name, (asked, found) in sites.items():
        if found is not None and found.name != asked:
            kind = f"*.{name.rpartition('.')[2]}"
            changed[kind if len(kinds[kind]) == 1 else name] = {"scheme": found.name}
    return each.with_site_options({}, changed) if changed else each


def _rounded_sites(each: Pass, model_map: ModelMap) -> Iterator[tuple[str, int, HasScheme]]:
    """Full name, inputs and the pass with its overrides, of every site for which a pass names a scheme."""
    if not isinstance(each, HasScheme):
        return
    for block in model_map.blocks:
        for site in block.structure.sites:
            name = block.full(site.name)
            chosen = each.for_site(name) if each.selects(name) else None
            if chosen is not None and chosen.scheme is not None:
                yield name, site.inputs, chosen


def _try(chosen: HasScheme, name: str, inputs: int, problems: dict[str, Indivisible]) -> Scheme | None:
    try:
        return resolve_scheme(chosen, name, inputs)
    except CompressError:
        assert chosen.scheme is not None, "only groups of a scheme can fail to divide"
        problems.setdefault(name, Indivisible(name, inputs, named_scheme(chosen.scheme)))
        return None


def _super_blocks(found: Sequence[Indivisible]) -> str:
    length = found[0].scheme.weights.scales.super_block
    return f" ({found[0].scheme.name}: super-blocks of {length})" if length else ""


def indivisible_error(found: Sequence[Indivisible]) -> CompressError:
    """One error for all sites that do not divide, with every way out."""
    rows = Counter(f"{re.sub(_NUMBER, '*', row.site)}: {row.inputs} inputs, {row.scheme.name}" for row in found)
    scheme = found[0].scheme.without_super_blocks() or found[0].scheme
    fixes = [f"`scheme: {scheme.with_group(None).name}`"]
    smaller = fitting_group(scheme.weights.group or 0, gcd(*(row.inputs for row in found)))
    if smaller is not None:
        fixes.insert(0, f"`scheme: {scheme.with_group(smaller).name}`")
    leaves = sorted({f'"*.{row.site.rpartition(".")[2]}"' for row in found})
    fixes += [
        f"exclude these sites with `exclude: [{', '.join(leaves)}]`",
        "or set `on_indivisible: fit|skip|channel|pad` for all such sites",
    ]
    sites = "1 site has inputs" if len(found) == 1 else f"{len(found)} sites have inputs"
    return CompressError(
        "scheme.indivisible",
        f"{sites} that do not divide into the groups of the scheme{_super_blocks(found)}",
        where="; ".join(f"{row} ({count} sites)" if count > 1 else row for row, count in rows.items()),
        fix="use " + ", or ".join(fixes[:-1]) + "; " + fixes[-1],
        exit_code=ExitCode.USAGE,
    )
