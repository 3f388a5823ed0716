"""A block whose residual stream changes basis on every skip connection: segments inside, shortcut matrices at the ends.

The block's own forward only adds to its input. The wrapper therefore passes the stream several times side by side: each
segment has the stream in its own basis. Norms read one segment, what they feed is added to the next, and the block's
code does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec
from llmcompress.modules.expression import Expression, Opaque, OutputPlaces
from llmcompress.modules.low_rank import part_expression
from llmcompress.modules.wrapper import Wrapper


@MODULES.register("segment_norm")
class SegmentNorm(CompressedModule):
    """RMSNorm without gain of the channels `start` to `start + width`, as if they were `divisor` channels.

    Source: Ashkboos et al., arXiv 2401.15024: what was sliced away counts as zero, so the mean square is still one
    over the original width.
    """

    frame: ClassVar[bool] = True

    def __init__(self, start: int, width: int, divisor: int, epsilon: float) -> None:
        super().__init__()
        self.divisor, self.epsilon = divisor, epsilon
        self.place(start, width)

    @override
    def spec(self) -> Spec:
        return {"start": self.start, "width": self.width, "divisor": self.divisor, "epsilon": self.epsilon}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(int(spec["start"]), int(spec["width"]), int(spec["divisor"]), float(spec["epsilon"]))

    @override
    def expression(self) -> Expression:
        return Opaque("a norm divides by what it finds in its input")

    def place(self, start: int, width: int) -> None:
        """Read other channels."""
        self.start = start
        self.width = self.in_features = self.out_features = width

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        segment = hidden[..., self.start : self.start + self.width]
        if segment.shape[-1] < self.width:  # a model that is run without its blocks, to see what they would be given
            segment = functional.pad(segment, (0, self.width - segment.shape[-1]))
        wide = segment.float()
        scale = (wide.square().sum(-1, keepdim=True) / self.divisor + self.epsilon).rsqrt()
        return (wide * scale).to(segment.dtype)

    @override
    def extra_repr(self) -> str:
        return f"{self.start}:{self.start + self.width} of the segments, divisor {self.divisor}"


def place_norm(module: nn.Module, start: int, width: int) -> None:
    """Let a segment norm read other channels."""
    assert isinstance(module, SegmentNorm)
    module.place(start, width)


@MODULES.register("segment")
class Segment(Wrapper):
    """A linear whose outputs stand between `before` and `after` zeros: it adds to one segment only."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    @override
    def spec(self) -> Spec:
        return {"before": self.before, "after": self.after}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(int(spec["before"]), int(spec["after"]))

    @override
    def expression(self) -> Expression:
        inner = part_expression(self.inner)
        outputs = inner.shape[0]
        places_K = torch.arange(self.before, self.before + outputs, device=inner.dense_weight().device)
        return OutputPlaces(inner, places_K, self.before + outputs + self.after)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(self.inner(x), (self.before, self.after))


def place_segment(module: nn.Module, before: int, after: int) -> None:
    """Let the linear in a segment write somewhere else."""
    assert isinstance(module, Segment)
    module.before, module.after = before, after


@MODULES.register("shortcuts")
class ShortcutBlock(Wrapper):
    """A block with a new basis of its residual stream after every addition.

    Segments: the stream as it enters; then, after every addition, the stream in its new basis. The first shortcut maps
    the input to segment 1 before the block runs, the second maps segment 1 to the basis of segment 2 afterwards; a
    block with a single addition (parallel attention and FFN) has no second one.
    """

    def __init__(self, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        assert len(widths) in (2, 3)
        self.widths = widths
        self.shortcut_in = nn.Parameter(torch.empty(widths[1], widths[0], dtype=dtype), requires_grad=False)
        self.shortcut_out = (
            nn.Parameter(torch.empty(widths[2], widths[1], dtype=dtype), requires_grad=False)
            if len(widths) == 3
            else None
        )

    @override
    def spec(self) -> Spec:
        return {"widths": list(self.widths)}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(tuple(int(width) for width in spec["widths"]), dtype)

    @override
    def expression(self) -> Expression:
        return Opaque("it runs a whole block, between two changes of the residual stream's basis")

    def set_shortcuts(self, matrices: Sequence[Tensor]) -> None:
        """The matrices of the skips, in order, each outputs × inputs."""
        self.shortcut_in = nn.Parameter(matrices[0].contiguous(), requires_grad=False)
        if self.shortcut_out is not None:
            self.shortcut_out = nn.Parameter(matrices[1].contiguous(), requires_grad=False)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output, in its own form; the hidden state comes first or by keyword."""
        by_keyword = "hidden_states" in kwargs
        hidden = kwargs.pop("hidden_states") if by_keyword else args[0]
        segments = [hidden, functional.linear(hidden, self.shortcut_in)]
        segments += [hidden.new_zeros(*hidden.shape[:-1], width) for width in self.widths[2:]]
        inside = torch.cat(segments, -1)
        output = (
            self.inner(*args, hidden_states=inside, **kwargs) if by_keyword else self.inner(inside, *args[1:], **kwargs)
        )
        if isinstance(output, Tensor):
            return self._merged(output)
        return (self._merged(output[0]), *output[1:])

    def _merged(self, inside: Tensor) -> Tensor:
        start, end = self.widths[0], self.widths[0] + self.widths[1]
        first = inside[..., start:end]
        return first if self.shortcut_out is None else functional.linear(first, self.shortcut_out) + inside[..., end:]

    @override
    def extra_repr(self) -> str:
        return " → ".join(str(width) for width in self.widths)


@MODULES.register("pass_through")
class PassThrough(CompressedModule):
    """Gives back what it gets: stands where a norm stood that the embedding has taken in."""

    frame: ClassVar[bool] = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = self.out_features = width

    @override
    def spec(self) -> Spec:
        return {"width": self.in_features}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(int(spec["width"]))

    @override
    def expression(self) -> Expression:
        return Opaque("it gives back its input: there are no numbers to say")

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden
