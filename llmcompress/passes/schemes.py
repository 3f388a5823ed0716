"""What happens to sites whose inputs do not divide into the groups of their scheme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal, Protocol, runtime_checkable

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.passes.base import Pass

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A block or expert in a site's name: the error lists kinds of sites, not every one of thousands."""

OnIndivisible = Literal["error", "skip", "channel", "pad"]


@runtime_checkable
class HasScheme(Protocol):
    """A quantization pass with the overrides of one site applied."""

    @property
    def scheme(self) -> str | None:
        """Name of the scheme; None for a pass that only rounds when asked to."""

    @property
    def on_indivisible(self) -> OnIndivisible:
        """What to do with a site whose inputs do not divide."""


@dataclass(frozen=True)
class Indivisible:
    """A site that cannot have the requested scheme."""

    site: str
    inputs: int
    scheme: Scheme


def resolve_scheme(pass_for_site: HasScheme, site_name: str, inputs: int) -> Scheme | None:
    """The scheme a site gets: the one asked for, or what `on_indivisible` says instead (None: it stays dense).

    `channel` keeps the numbers and takes one scale per row; `pad` keeps the scheme, and the last group is shorter.

    Raises: CompressError when the inputs do not divide and the pass says `error`.
    """
    if pass_for_site.scheme is None:
        return None
    scheme = named_scheme(pass_for_site.scheme)
    group = scheme.weights.group
    if group is None or inputs % group == 0 or pass_for_site.on_indivisible == "pad":
        return scheme
    if pass_for_site.on_indivisible == "skip":
        return None
    if pass_for_site.on_indivisible == "channel" and scheme.activations != "group":
        return scheme.with_group(None)
    raise indivisible_error([Indivisible(site_name, inputs, scheme)])


def site_schemes(passes: Iterable[Pass], model_map: ModelMap) -> dict[str, Scheme]:
    """Full name → scheme of every site that will hold codes when all passes are done.

    Raises: CompressError listing every site that does not divide, not only the first.
    """
    schemes: dict[str, Scheme] = {}
    problems: dict[str, Indivisible] = {}
    for each in passes:
        if not isinstance(each, HasScheme):
            continue
        for block in model_map.blocks:
            for site in block.structure.sites:
                name = block.full(site.name)
                chosen = each.for_site(name) if each.selects(name) else None
                if chosen is None:
                    continue
                found = _try(chosen, name, site.inputs, problems)
                if found and chosen.quantizes():
                    schemes[name] = found
    if problems:
        raise indivisible_error(list(problems.values()))
    return schemes


def _try(chosen: HasScheme, name: str, inputs: int, problems: dict[str, Indivisible]) -> Scheme | None:
    try:
        return resolve_scheme(chosen, name, inputs)
    except CompressError:
        assert chosen.scheme is not None, "only groups of a scheme can fail to divide"
        problems.setdefault(name, Indivisible(name, inputs, named_scheme(chosen.scheme)))
        return None


def indivisible_error(found: Sequence[Indivisible]) -> CompressError:
    """One error for all sites that do not divide, with every way out."""
    rows = Counter(f"{re.sub(_NUMBER, '*', row.site)}: {row.inputs} inputs, {row.scheme.name}" for row in found)
    scheme, group = found[0].scheme, found[0].scheme.weights.group or 0
    fixes = [f"`scheme: {scheme.with_group(None).name}`"]
    smaller = _largest_group(group, [row.inputs for row in found])
    if smaller > 1:
        fixes.insert(0, f"`scheme: {scheme.with_group(smaller).name}`")
    leaves = sorted({f'"*.{row.site.rpartition(".")[2]}"' for row in found})
    fixes += [
        f"exclude these sites with `exclude: [{', '.join(leaves)}]`",
        "or set `on_indivisible: skip|channel|pad` for all such sites",
    ]
    sites = "1 site has inputs" if len(found) == 1 else f"{len(found)} sites have inputs"
    return CompressError(
        "scheme.indivisible",
        f"{sites} that do not divide into the groups of the scheme",
        where="; ".join(f"{row} ({count} sites)" if count > 1 else row for row, count in rows.items()),
        fix="use " + ", or ".join(fixes[:-1]) + "; " + fixes[-1],
        exit_code=ExitCode.USAGE,
    )


def _largest_group(group: int, inputs: Sequence[int]) -> int:
    """The largest power of two below `group` that divides all inputs, or, where that is tiny, the largest divisor."""
    common = gcd(*inputs)
    divisors = [length for length in range(2, group) if common % length == 0]
    powers = [length for length in divisors if length & (length - 1) == 0 and length >= 16]
    return max(powers or divisors, default=1)
