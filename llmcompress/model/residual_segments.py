"""Puts a live block into segments (`modules/residual.py`): a separate basis of the residual stream after every
addition.

D = width of the stream; in, out = of one skip connection; K = kept directions.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.model.block_experiment import LINEARS
from llmcompress.model.residual import Ports, Residual, StreamNorm, refused
from llmcompress.model.rotation import contract
from llmcompress.model.skeleton import put_module
from llmcompress.modules.residual import Segment, SegmentNorm, ShortcutBlock, place_norm, place_segment


class ResidualSegments:
    """A block prepared by `make_rotatable`, wrapped: segment 0 is the stream as it enters; all are D wide at first."""

    @torch.no_grad()
    def __init__(self, block: nn.Module, ports: Ports, width: int) -> None:
        """Put the block, in place, into segments.

        Raises: CompressError for a block that adds to the stream by other than linears, or more than twice.
        """
        if ports.stages > 2:
            raise refused(
                "a block reads the residual stream more than twice in a row; try `form: global`", type(block).__name__
            )
        self.ports, self.block = ports, block
        self.bases = [torch.eye(width)] * (1 + ports.stages)
        self.wrapper = ShortcutBlock(self._widths(), torch.float32)
        self.wrapper.take(block)
        for owner in dict.fromkeys(writer.port.owner for writer in ports.writers):
            linear = block.get_submodule(owner)
            if not isinstance(linear, LINEARS):
                raise refused("something other than a linear adds to the residual stream; try `form: global`", owner)
            segment = Segment(0, 0)
            segment.take(linear)
            put_module(block, owner, segment)
        for norm in ports.norms:
            put_module(block, norm.name, SegmentNorm(0, 0, width, norm.form.epsilon))
        self._place()

    @torch.no_grad()
    def narrow(self, segment: int, kept_DK: Tensor) -> None:
        """Another basis for a segment that is still D wide: who writes it, who reads it, and the skips at its ends."""
        self.bases[segment] = kept_DK = kept_DK.float()
        for writer in self.ports.writers:
            if writer.stage == segment - 1:
                owner, _, leaf = writer.port.parameter.rpartition(".")
                contract(self.block, f"{owner}.inner.{leaf}", writer.port.axis, kept_DK)
        for norm in self.ports.norms:
            if norm.stage == segment:
                for port in norm.readers:
                    contract(self.block, port.parameter, port.axis, kept_DK)
        self._place()

    def norm(self, norm: StreamNorm) -> nn.Module:
        """What stands in the norm's place."""
        return self.block.get_submodule(norm.name)

    def segment(self, inside: Tensor, index: int) -> Tensor:
        """One segment of what the block computes with."""
        widths = self._widths()
        return inside[..., sum(widths[:index]) : sum(widths[: index + 1])]

    def _widths(self) -> tuple[int, ...]:
        return tuple(basis.shape[1] for basis in self.bases)

    def _place(self) -> None:
        """Let all modules know the widths of the segments; the skips follow from the bases at their ends."""
        widths = self._widths()
        self.wrapper.widths = widths
        for norm in self.ports.norms:
            place_norm(self.block.get_submodule(norm.name), sum(widths[: norm.stage]), widths[norm.stage])
        for writer in self.ports.writers:
            segment = self.block.get_submodule(writer.port.owner)
            place_segment(segment, sum(widths[: writer.stage + 1]), sum(widths[writer.stage + 2 :]))
        device = next(self.block.parameters()).device
        self.wrapper.set_shortcuts([after.to(device).T @ before.to(device) for before, after in pairwise(self.bases)])


def last_norm_to_segment(model: PreTrainedModel, residual: Residual) -> None:
    """The last norm without gain: it reads the whole stream, whose mean is no mean of channels any more."""
    norm = residual.outside_blocks.norms[0]
    put_module(model, norm.name, SegmentNorm(0, residual.width, residual.width, norm.form.epsilon))
