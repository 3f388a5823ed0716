"""The map of a model as plain data: blocks, linear sites, shared inputs, folds, width groups, tying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class SiteInfo:
    """One linear inside a block; `name` is relative to the block (`self_attn.q_proj`)."""

    name: str
    outputs: int
    inputs: int
    has_bias: bool
    transposed: bool = False
    """True for Conv1D, which stores inputs × outputs."""


@dataclass(frozen=True)
class InputGroup:
    """Sites that read the very same tensor, so one statistic serves them all."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """A fold: dividing a producer's channels and multiplying the consumers' columns leaves the block unchanged.

    Consumer input channel `c` is fed by producer channel `channel_map[c]` (a norm's channel, or a row of a
    producing linear). A norm whose gain is `offset + weight` has offset 1 (Gemma), otherwise 0.
    """

    producer: str
    producer_is_norm: bool
    consumers: tuple[str, ...]
    channel_map: tuple[int, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class WidthPart:
    """The rows or columns of one site that belong to each unit: `indices[unit]`."""

    site: str
    axis: Literal["rows", "columns"]
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class WidthGroup:
    """Removing unit u means removing `indices[u]` of every part together (an FFN channel, a KV group)."""

    units: int
    parts: tuple[WidthPart, ...]
    fixed: bool = False
    """Whether the block needs all of them, as where the model counts heads outside of its blocks (ALiBi)."""

    @cached_property
    def has_single_columns(self) -> bool:
        """Whether every unit is at most one column of each part that it has columns of."""
        columns = (part for part in self.parts if part.axis == "columns")
        return all(max(map(len, part.indices), default=0) <= 1 for part in columns)


@dataclass(frozen=True)
class Refusal:
    """A module that will not be compressed, with the reason; shown before any work."""

    name: str
    reason: str


@dataclass(frozen=True)
class BlockStructure:
    """The structure of one kind of block; blocks of the same kind share one instance. Names are relative."""

    sites: tuple[SiteInfo, ...]
    groups: tuple[InputGroup, ...]
    """In order of execution."""
    folds: tuple[Fold, ...]
    width_groups: tuple[WidthGroup, ...]
    refused: tuple[Refusal, ...] = ()

    def site(self, name: str) -> SiteInfo:
        """The site called `name` (relative to the block)."""
        return next(site for site in self.sites if site.name == name)


@dataclass(frozen=True)
class BlockInfo:
    """One block: its full module name and its structure."""

    index: int
    name: str
    structure: BlockStructure

    def full(self, relative: str) -> str:
        """The full module name of something in this block."""
        return f"{self.name}.{relative}"


@dataclass(frozen=True)
class ModelMap:
    """The map of the whole model."""

    family: str
    hidden_size: int
    blocks: tuple[BlockInfo, ...]
    embedding: str
    head: str
    tied: bool
    refused: tuple[Refusal, ...] = ()
    vocabulary: int = 0
    """Rows of the embedding."""

    def site_names(self) -> tuple[str, ...]:
        """Full names of all sites, in model order."""
        return tuple(block.full(site.name) for block in self.blocks for site in block.structure.sites)

    def with_own_head(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """What files hold, by full name, once a tied head has a matrix of its own."""
        return {**tensors, f"{self.head}.weight": tensors[f"{self.embedding}.weight"]} if self.tied else dict(tensors)
