"""What a linear becomes by each option, as far as costs go: its matrices, their shapes, and how they are stored.

A linear that holds codes is one matrix; one that was factored is two, one with a low-rank branch is three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from llmcompress.errors import CompressError, ExitCode
from llmcompress.formats.named import Kind
from llmcompress.model.map import BlockInfo, SiteInfo
from llmcompress.passes.base import BlockPass, Pass
from llmcompress.passes.schemes import site_schemes
from llmcompress.plan_search.plan_space import PlanSpace, Unit
from llmcompress.plan_search.space import DROPPED

DENSE = "dense"


@dataclass(frozen=True, order=True)
class Matrix:
    """A product that the runtime computes."""

    outputs: int
    inputs: int
    form: str = DENSE
    """`dense`, or the name of a scheme."""

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Form:
    """A linear after its passes."""

    site: SiteInfo
    """With the sizes that the body of its block leaves."""
    name: str
    """Full."""
    matrices: tuple[Matrix, ...]
    """What it multiplies by, all of them for every token."""
    tensors: Mapping[str, Kind] | None = None
    """What our own format holds of it, by last names, where no arithmetic tells and it was tried."""

    @property
    def scheme(self) -> str | None:
        """The scheme, where it is a single matrix of codes."""
        (first, *others) = self.matrices
        return first.form if not others and first.form != DENSE else None


@dataclass(frozen=True, eq=False)
class Forms:
    """Of all options of a space."""

    space: PlanSpace
    tried: Mapping[tuple[str, str, str], Form] = field(default_factory=dict)
    """Body, site option, full name → what was found by trying it, where no arithmetic tells the sizes."""

    @cached_property
    def blocks(self) -> dict[tuple[int, str], BlockInfo]:
        """Block and body → its map with the sizes of that body."""
        return {
            (block.index, body): _shrunk(block, body, passes)
            for block in self.space.model_map.blocks
            for body, passes in self.space.space.bodies.items()
        }

    def of(self, unit: Unit, body: str, option: str) -> Iterator[Form]:
        """Every linear that the unit decides about, in all its blocks."""
        for index in unit.blocks:
            block = self.blocks[index, body]
            for site in unit.sites:
                name = block.full(site)
                found = self.tried.get((body, option, name))
                yield found or _by_arithmetic(self.space, block, site, option)

    @cached_property
    def unknown(self) -> tuple[tuple[str, str], ...]:
        """Site options and full names of linears whose sizes no arithmetic tells."""
        return tuple(
            (option, name)
            for option, passes in self.space.space.sites.items()
            for block in self.space.model_map.blocks
            for site in block.structure.sites
            if not _is_plain(passes, name := block.full(site.name), site, self.space)
        )


def bodies_of(unit: Unit) -> tuple[str, ...]:
    """The bodies of a block that have linears, in the order of `Additive.of_sites`."""
    return tuple(option for option in unit.options if option != DROPPED)


def _shrunk(block: BlockInfo, body: str, passes: tuple[Pass, ...]) -> BlockInfo:
    for each in passes:
        assert isinstance(each, BlockPass)
        found = each.block_after(block)
        if found is None:
            raise CompressError(
                "search.costs.unknown",
                f"how large a block is after `bodies: {body}` depends on data, so bytes and seconds of a plan cannot "
                "be known before it is made",
                where=block.name,
                fix="use `width` with `allocation: uniform`, with one body for each fraction",
                exit_code=ExitCode.USAGE,
            )
        block = found
    return block


def _by_arithmetic(space: PlanSpace, block: BlockInfo, site: str, option: str) -> Form:
    info, name, passes = block.structure.site(site), block.full(site), space.space.sites[option]
    if not _is_plain(passes, name, info, space):
        raise CompressError(
            "search.costs.unknown",
            f"no arithmetic tells what `sites: {option}` makes of a linear",
            where=name,
            fix="let it be tried on a block of random weights: `forms_of`",
            exit_code=ExitCode.USAGE,
        )
    here = replace(space.model_map, blocks=(replace(block, structure=replace(block.structure, sites=(info,))),))
    scheme = site_schemes([each for each in passes if each.selects(name)], here).get(name)
    return Form(info, name, (Matrix(info.outputs, info.inputs, scheme.name if scheme else DENSE),))


def _is_plain(passes: tuple[Pass, ...], name: str, info: SiteInfo, space: PlanSpace) -> bool:
    """Whether the linear stays one matrix of its shape: dense, or codes of a scheme."""
    return all(
        each.names_after(name) == (name,)
        and "factors" not in each.traits()
        and each.kept_fraction(name, info, space.model_map) == 1.0
        for each in passes
        if each.selects(name)
    )
