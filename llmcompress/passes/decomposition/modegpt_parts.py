"""What MoDeGPT can reduce in a block, and how many parameters each unit of it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmcompress.model.attention import Attention
from llmcompress.model.map import BlockInfo
from llmcompress.model.units import groups_of

Kind = Literal["coupling", "values", "channels"]

MIXED = "queries and keys kept: rows of a head cannot be removed individually (for example because of a QK norm)"
SINKS = "values kept: their bias cannot be folded into the output projection, since attention weights do not sum to one"


@dataclass(frozen=True)
class Part:
    """A part of a block that can be reduced: an FFN's channels, or rows of all heads of an attention."""

    kind: Kind
    number: int
    """Which width group of the block, or which attention."""
    units: int
    step: int
    """Units go in multiples of this: the two rows of a rotary pair together."""
    parameters: int
    """Of one unit, biases included."""

    def kept(self, share: float) -> int:
        """Units that are kept if about that fraction is removed: at least one step."""
        return max(self.step, self.step * round(self.units * (1 - share) / self.step))


def parts_of(info: BlockInfo, attentions: Sequence[Attention], selects: Callable[[str], bool]) -> list[Part]:
    """The parts all of whose sites are selected; channels last, for they are the finest."""
    parts = []
    for number, attention in enumerate(attentions):
        if can_couple(attention) and all(map(selects, _sites(info, attention, _score_rows(attention)))):
            parts.append(_coupling(info, number, attention))
        names = [*_sites(info, attention, _value_rows(attention)), info.full(attention.reader)]
        if can_move(info, attention) and all(map(selects, names)):
            parts.append(_values(info, number, attention))
    for group in groups_of(info):
        if group.kind == "channels" and all(map(selects, group.sites)):
            biases = sum(info.structure.site(part.site).has_bias for part in group.parts if part.axis == "rows")
            parts.append(Part("channels", group.index, group.units, 1, group.parameters + biases))
    return parts


def reasons(info: BlockInfo, attentions: Sequence[Attention]) -> list[str]:
    """Why something of an attention cannot be made smaller."""
    mixed = [MIXED for attention in attentions if not can_couple(attention)]
    return mixed + [SINKS for attention in attentions if not can_move(info, attention)]


def can_couple(attention: Attention) -> bool:
    """Whether some query and key rows can go without all others of their head."""
    return all(len(group.atoms) > 1 for group in attention.groups)


def can_move(info: BlockInfo, attention: Attention) -> bool:
    """Whether the value bias, if there is one, passes through the attention unchanged."""
    biased = any(info.structure.site(name).has_bias for name in _names(attention, _value_rows(attention)))
    return attention.averages or not biased


def _coupling(info: BlockInfo, number: int, attention: Attention) -> Part:
    atoms = attention.groups[0].atoms
    units = min(sum(len(atom.keys) for atom in group.atoms) for group in attention.groups)
    total = sum(_row_parameters(info, attention, row) for row in _score_rows(attention))
    return Part("coupling", number, units, min(len(atom.keys) for atom in atoms), total // units)


def _values(info: BlockInfo, number: int, attention: Attention) -> Part:
    units = min(len(group.values) for group in attention.groups)
    total = sum(_row_parameters(info, attention, row) for row in _value_rows(attention))
    total += info.structure.site(attention.reader).outputs * sum(
        len(columns) for group in attention.groups for columns in group.heads
    )
    return Part("values", number, units, 1, total // units)


def _score_rows(attention: Attention) -> list[int]:
    atoms = [atom for group in attention.groups for atom in group.atoms]
    return [row for atom in atoms for rows in (atom.keys, *atom.queries) for row in rows]


def _value_rows(attention: Attention) -> list[int]:
    return [row for group in attention.groups for row in group.values]


def _names(attention: Attention, rows: Iterable[int]) -> list[str]:
    return sorted({attention.channels.locate(row)[0] for row in rows})


def _sites(info: BlockInfo, attention: Attention, rows: Iterable[int]) -> list[str]:
    return [info.full(name) for name in _names(attention, rows)]


def _row_parameters(info: BlockInfo, attention: Attention, row: int) -> int:
    site = info.structure.site(attention.channels.locate(row)[0])
    return site.inputs + site.has_bias
