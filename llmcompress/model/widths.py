"""Width groups of one block: rows and columns that can only be removed together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, islice
from math import comb

import torch
from torch import Tensor

from llmcompress.model.block_experiment import BlockExperiment, sizes
from llmcompress.model.channel_tracing import NONE, Channels, Link
from llmcompress.model.map import WidthGroup, WidthPart

Unit = tuple[list[int], list[int]]
"""Channels (in the numbering of a `Channels`) and input columns of the reader."""

_MOST_UNITS_BY_SEARCH = 256
"""More KV groups than any attention has; every unit costs a few forwards."""


def width_group(
    experiment: BlockExperiment, channels: Channels, link: Link, readers: Sequence[str]
) -> WidthGroup | None:
    """The units that feed the columns of one reader, or None if there are fewer than two.

    `experiment` holds sequences of several tokens, so that attention shows which queries and keys belong to a value.
    `readers` are the linears that read the same tensor as the link's reader.
    """
    if link.reader not in experiment.base.inputs:  # an expert that no token of these sequences reached
        return None
    units = _units_of_single_tokens(link)
    if not _complete(experiment, channels, link.reader, units):
        units = _units_by_search(experiment, channels, link.reader)
    if len(units) < 2:
        return None
    return WidthGroup(len(units), tuple(_parts(channels, readers, units)))


def removable(experiment: BlockExperiment, groups: Sequence[WidthGroup]) -> bool:
    """Whether the rows of units that are cut off from their readers change nothing at all.

    Units are cut in sets such that for any two there is a set with the one and without the other.
    """
    sets = [_separating_sets(group.units) for group in groups]
    generator = torch.Generator().manual_seed(3)
    for turn in range(max(map(len, sets))):
        masks: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        for group, separating in zip(groups, sets, strict=True):
            cut = separating[turn % len(separating)]
            for part in group.parts:
                outputs, inputs = sizes(experiment.linears[part.site])
                chosen = [index for unit in cut for index in part.indices[unit]]
                if part.axis == "columns":
                    masks.setdefault(part.site, torch.ones(inputs))[chosen] = 0
                else:
                    factors = 0.5 + torch.rand(len(chosen), generator=generator)
                    scales.setdefault(part.site, torch.ones(outputs))[chosen] = factors
        before, after = experiment.run(masks=masks).output, experiment.run(scales, masks=masks).output
        if not torch.allclose(before, after, rtol=1e-5, atol=1e-5):
            return False
    return True


def _separating_sets(units: int) -> list[list[int]]:
    """Few sets of units: each unit is in another half of the sets, and no half holds another (Sperner)."""
    count = next(count for count in range(1, 64) if comb(count, count // 2) >= units)
    memberships = islice(combinations(range(count), count // 2), units)
    sets: list[list[int]] = [[] for _ in range(count)]
    for unit, membership in enumerate(memberships):
        for index in membership:
            sets[index].append(unit)
    return sets


def _units_of_single_tokens(link: Link) -> list[Unit]:
    """Columns that share a channel belong to one unit (a value row that feeds several query heads)."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for column, fed_by in enumerate(zip(link.proportional, link.other, strict=True)):
        for channel in fed_by:
            if channel != NONE:
                parent[root(channel)] = root(~column)  # columns are the negative nodes
    units: defaultdict[int, Unit] = defaultdict(lambda: ([], []))
    for node in sorted(parent):
        rows, columns = units[root(node)]
        (rows if node >= 0 else columns).append(node if node >= 0 else ~node)
    return _ordered(units.values())


def _complete(experiment: BlockExperiment, channels: Channels, reader: str, units: Sequence[Unit]) -> bool:
    """Whether a random half of the units depends on no channel but its own, over several tokens."""
    generator = torch.Generator().manual_seed(1)
    half = [unit for unit in units if torch.rand((), generator=generator) < 0.5] or list(units[:1])
    rows = _channels_behind(experiment, channels, reader, [column for _, columns in half for column in columns])
    return rows == {row for rows, _ in half for row in rows}


def _units_by_search(experiment: BlockExperiment, channels: Channels, reader: str) -> list[Unit]:
    """Grow a unit from one column: all channels that feed it, all columns they feed, until nothing is added."""
    width = experiment.base.inputs[reader].shape[-1]
    waiting, taken = set(range(width)), set[int]()
    units: list[Unit] = []
    while waiting:
        columns, more = set[int](), {min(waiting)}
        while more != columns:
            columns = more
            rows = _channels_behind(experiment, channels, reader, sorted(columns))
            more = columns | _columns_moved(experiment, channels, reader, sorted(rows))
        if not rows or rows & taken or not columns <= waiting or len(columns) * _MOST_UNITS_BY_SEARCH < width:
            return []
        units.append((sorted(rows), sorted(columns)))
        waiting -= columns
        taken |= rows
    return _ordered(units)


@torch.enable_grad()
def _channels_behind(experiment: BlockExperiment, channels: Channels, reader: str, columns: Sequence[int]) -> set[int]:
    """The channels that the reader's columns depend on: those with a gradient. Independent ones have exactly none."""
    scale = torch.ones(channels.total, requires_grad=True)
    seen = experiment.run(channels.split(scale), until=[reader]).inputs[reader][..., list(columns)]
    mix = torch.randn(seen.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((seen * mix).sum(), scale)
    return set(gradient.nonzero().flatten().tolist())


def _columns_moved(experiment: BlockExperiment, channels: Channels, reader: str, rows: Sequence[int]) -> set[int]:
    """The reader's columns that change when these channels do."""
    before = experiment.base.rows_NI(reader)
    after = experiment.run(channels.split(_changed(channels, rows)), until=[reader]).rows_NI(reader)
    assert before is not None and after is not None and before.shape == after.shape
    moved = ((after - before).abs() > 1e-6 * before.abs().amax()).any(0)
    return set(moved.nonzero().flatten().tolist())


def _changed(channels: Channels, rows: Sequence[int]) -> Tensor:
    """Different factors for different rows: a norm over a head's queries would hide a common one."""
    scale = torch.ones(channels.total)
    scale[list(rows)] = 0.5 + torch.rand(len(rows), generator=torch.Generator().manual_seed(4))
    return scale


def _parts(channels: Channels, readers: Sequence[str], units: Sequence[Unit]) -> list[WidthPart]:
    """Rows of every tap that has some in the units, then columns of the readers."""
    parts = []
    for tap, width in channels.taps:
        start = channels.start(tap)
        indices = tuple(tuple(row - start for row in rows if start <= row < start + width) for rows, _ in units)
        if any(indices):
            parts.append(WidthPart(tap, "rows", indices))
    columns = tuple(tuple(columns) for _, columns in units)
    return [*parts, *(WidthPart(reader, "columns", columns) for reader in readers)]


def _ordered(units: Iterable[Unit]) -> list[Unit]:
    return sorted(((sorted(rows), sorted(columns)) for rows, columns in units), key=lambda unit: unit[1])
