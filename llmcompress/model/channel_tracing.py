"""Traces which producer channels feed which consumer channels by scaling coded subsets. N = tokens, I = inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.model.block_experiment import BlockExperiment, Observed

NONE = -1
_SAME, _DOUBLE, _OTHER = 0, 1, 2


@dataclass(frozen=True)
class Channels:
    """The output channels of several taps in one numbering: all of the first tap, then all of the second, …"""

    taps: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """How many channels there are."""
        return sum(width for _, width in self.taps)

    def split(self, per_channel: Tensor) -> dict[str, Tensor]:
        """A vector over all channels, cut into one piece per tap."""
        pieces = torch.split(per_channel, [width for _, width in self.taps])
        return {name: piece for (name, _), piece in zip(self.taps, pieces, strict=True)}

    def locate(self, channel: int) -> tuple[str, int]:
        """The tap a channel belongs to, and its number there."""
        for name, width in self.taps:
            if channel < width:
                return name, channel
            channel -= width
        raise IndexError(channel)

    def start(self, tap: str) -> int:
        """The number of a tap's first channel."""
        names = [name for name, _ in self.taps]
        return sum(width for _, width in self.taps[: names.index(tap)])


@dataclass(frozen=True)
class Link:
    """A tap that reads some channels and nothing else that was scaled; one entry per input channel of the reader."""

    reader: str
    proportional: tuple[int, ...]
    """The producer channel it moves in exact proportion with, or NONE."""
    other: tuple[int, ...]
    """The producer channel that moves it in some other way (the gate of a gated FFN), or NONE."""


def trace_channels(experiment: BlockExperiment, channels: Channels, readers: Sequence[str]) -> list[Link]:
    """The readers whose every input channel depends on at most one channel proportionally and one otherwise.

    Every channel number is written in binary. For each bit, two forwards: channels with the bit set are doubled,
    then those with the bit clear. An input channel that stays or doubles shows the bit of its proportional channel;
    one that moves otherwise shows the bit of its other channel, and then the opposite forward, in which that channel
    rests, still shows the proportional one. Doubling is exact in every float format, so any difference is real.
    """
    if not readers:
        return []
    bits = max(1, (channels.total - 1).bit_length())
    numbers = torch.arange(channels.total)
    base = experiment.base
    read = {name: torch.zeros(2, base.inputs[name].shape[-1], dtype=torch.long) for name in readers}
    kinds: dict[str, Tensor] = {}
    for bit in range(bits):
        set_ = (numbers >> bit) & 1
        doubled = experiment.run(channels.split(1.0 + set_), until=read.keys())
        opposite = experiment.run(channels.split(2.0 - set_), until=read.keys())
        for name in list(read):
            first, second = (_movement(base, run, name) for run in (doubled, opposite))
            kind = _kind(first, second)
            if (kind == NONE).any() or (kind != kinds.setdefault(name, kind)).any():
                del read[name]
                continue
            other_bit = first == _OTHER
            proportional_bit = torch.where(other_bit, second == _SAME, first == _DOUBLE)
            read[name] += torch.stack([proportional_bit, other_bit]).long() << bit
        if not read:
            return []
    return [_link(name, codes, kinds[name]) for name, codes in read.items()]


def _link(name: str, codes: Tensor, kind: Tensor) -> Link:
    proportional, other = codes
    # Where nothing moves in proportion, both decode to the same number: a channel cannot be both.
    no_proportional = (kind == _OTHER) & (proportional == other)
    proportional = torch.where(no_proportional, torch.full_like(proportional, NONE), proportional)
    other = torch.where(kind == _OTHER, other, torch.full_like(other, NONE))
    return Link(name, tuple(proportional.tolist()), tuple(other.tolist()))


def _kind(first: Tensor, second: Tensor) -> Tensor:
    """Per input channel: _DOUBLE (moves in proportion only), _OTHER (not in proportion with one channel), or NONE."""
    kind = torch.full_like(first, NONE)
    kind[(first == _SAME) & (second == _DOUBLE) | (first == _DOUBLE) & (second == _SAME)] = _DOUBLE
    kind[(first == _OTHER) ^ (second == _OTHER)] = _OTHER
    return kind


def _movement(base: Observed, run: Observed, name: str) -> Tensor:
    before, after = base.rows_NI(name), run.rows_NI(name)
    assert before is not None
    if after is None or after.shape != before.shape:  # other tokens were routed here
        return torch.full((before.shape[1],), _OTHER)
    near = 1e-5 * before.abs() + 1e-7 * before.square().mean().sqrt()
    same = ((after - before).abs() <= near).all(0)
    double = ((after - 2 * before).abs() <= near).all(0)
    movement = torch.full((before.shape[1],), _OTHER)
    movement[double] = _DOUBLE
    movement[same] = _SAME
    return movement
