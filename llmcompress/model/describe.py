"""A map as a few JSON rows for `llmcompress inspect`, with blocks of one kind and repeated experts merged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from llmcompress.model.map import BlockStructure, Fold, ModelMap, Refusal, WidthGroup

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def describe(found: ModelMap) -> dict[str, Any]:
    """The whole map as plain data; names inside blocks are relative to the block."""
    kinds: dict[int, tuple[BlockStructure, list[int]]] = {}
    for block in found.blocks:
        kinds.setdefault(id(block.structure), (block.structure, []))[1].append(block.index)
    parent = found.blocks[0].name.rpartition(".")[0]
    return {
        "family": found.family,
        "hidden_size": found.hidden_size,
        "embedding": found.embedding,
        "head": found.head,
        "tied": found.tied,
        "blocks": len(found.blocks),
        "sites": len(found.site_names()),
        "kinds": [{"blocks": f"{parent}.{ranges(which)}", **_kind(structure)} for structure, which in kinds.values()],
        "refused": _refused(found.refused),
    }


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _kind(structure: BlockStructure) -> dict[str, Any]:
    sites = [
        {"name": site.name, "outputs": site.outputs, "inputs": site.inputs, "bias": site.has_bias}
        | ({"transposed": True} if site.transposed else {})
        for site in structure.sites
    ]
    return {
        "sites": together(sites),
        "groups": together([{"same_input": list(group.sites)} for group in structure.groups]),
        "folds": together([_fold(fold) for fold in structure.folds]),
        "width_groups": together([_width(group) for group in structure.width_groups]),
        "refused": _refused(structure.refused),
    }


def _fold(fold: Fold) -> dict[str, Any]:
    row: dict[str, Any] = {"producer": fold.producer, "consumers": list(fold.consumers), "channels": _channels(fold)}
    return row | ({"gain": f"{fold.offset:g} + weight"} if fold.offset else {})


def _channels(fold: Fold) -> str:
    """What feeds the consumers' channels, in words."""
    inputs, used = len(fold.channel_map), len(set(fold.channel_map))
    if fold.channel_map == tuple(range(inputs)):
        return f"{inputs}, in order"
    shared = f", each feeding {inputs // used}" if inputs != used else ""
    return f"{used} rows between {min(fold.channel_map)} and {max(fold.channel_map)}{shared}"


def _width(group: WidthGroup) -> dict[str, Any]:
    parts = {f"{part.site} {part.axis}": sum(map(len, part.indices)) / group.units for part in group.parts}
    each = {name: int(n) if n == int(n) else round(n, 2) for name, n in parts.items()}
    return {"units": group.units, "each": each} | ({"fixed": True} if group.fixed else {})


def _refused(refusals: Sequence[Refusal]) -> list[dict[str, Any]]:
    return together([{"name": refusal.name, "reason": refusal.reason} for refusal in refusals])


def together(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ only in numbers inside module names become one: `experts.{0-7}.up_proj`."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        text = json.dumps(row)
        alike.setdefault(_NUMBER.sub("#", text), []).append(text)
    merged = []
    for texts in alike.values():
        columns = iter(zip(*(_NUMBER.findall(text) for text in texts), strict=True))
        merged.append(json.loads(_NUMBER.sub(lambda _: _span(next(columns)), texts[0])))  # noqa: B023
    return merged


def _span(numbers: Sequence[str]) -> str:
    distinct = {int(number) for number in numbers}
    return numbers[0] if len(distinct) == 1 else f"{{{ranges(distinct)}}}"
