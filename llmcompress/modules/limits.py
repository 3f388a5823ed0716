"""Which quantized tensors a target supports, as data for quantizers and exporters. I = inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmcompress.modules.scheme import Scheme


@dataclass(frozen=True)
class TargetLimits:
    """What a format or a runtime requires of codes and scales; the defaults require nothing.

    A quantizer respects `positive_scales` by itself if the recipe names the target
    (`passes/quantization/target_limits.py`). The other limits are decisions of the recipe's author: a scheme that
    violates one is refused, and the nearest valid scheme is suggested.
    """

    positive_scales: bool = False
    """Negative scales are not supported."""
    scale_dtypes: frozenset[torch.dtype] | None = None
    """Supported dtypes of scales."""
    bits: frozenset[int] | None = None
    """Supported bit widths."""
    groups: frozenset[int] | None = None
    """Supported group sizes, other than the whole row."""
    group_multiple: int | None = None
    """Group sizes, and whole rows, must be multiples of it."""
    whole_rows: bool = True
    """A row may be one group."""
    ragged_groups: bool = True
    """The last group of a row may be shorter."""
    symmetric_only: bool = False
    """No zero points."""
    integers_only: bool = False
    """No floats."""
    super_blocks: bool = False
    """K-quants: scales in two levels, of groups and of super-blocks of 256 inputs."""
    rounded_inputs: bool = True
    """Schemes may round activations."""
    rounded_embedding: bool = False
    """The embedding may be codes, also where it is the head."""

    def problem(self, scheme: Scheme, inputs: int, scale_dtype: torch.dtype | None = None) -> str | None:
        """Why codes of that scheme, I of them in a row, cannot be held; None when they can.

        `scale_dtype` None: not known yet.
        """
        grid, group = scheme.weights, group_of(scheme, inputs)
        if self.integers_only and grid.number is not None:
            return f"it supports only integers, and {scheme.name} uses floats"
        if grid.scales.super_block is not None and not self.super_blocks:
            return f"it does not support the two levels of scales of {scheme.name}"
        if self.bits is not None and grid.bits not in self.bits:
            return f"it does not support {grid.bits}-bit codes"
        if self.symmetric_only and not grid.symmetric:
            return "it does not support zero points"
        if grid.scales.super_block is not None and inputs % grid.scales.super_block:
            return f"{inputs} inputs are no whole super-blocks of {grid.scales.super_block}"
        if self.positive_scales and grid.mirrors:
            return "it does not support negative scales"
        if group is None and not self.whole_rows:
            return "it does not support one scale per row"
        if group is not None and self.groups is not None and group not in self.groups:
            return f"it does not support groups of {group}"
        if grid.scales.super_block is not None:
            return (
                None if self.rounded_inputs or not scheme.activations else "it does not support quantized activations"
            )
        if self.group_multiple and (group or inputs) % self.group_multiple:
            what = f"groups of {group}" if group else f"rows of {inputs} inputs"
            return f"it does not support {what}, only multiples of {self.group_multiple}"
        if self.group_multiple and inputs % self.group_multiple:
            return f"it does not support rows of {inputs} inputs, only multiples of {self.group_multiple}"
        if group is not None and not self.ragged_groups and inputs % group:
            return f"{inputs} inputs do not divide into groups of {group}, and it does not support a shorter last group"
        if not self.rounded_inputs and scheme.activations:
            return "it does not support quantized activations"
        if self.scale_dtypes is not None and grid.scales.bits is None and scale_dtype not in (None, *self.scale_dtypes):
            return f"it does not support scales in {str(scale_dtype).removeprefix('torch.')}"
        return None

    def nearest(self, scheme: Scheme, inputs: int) -> Scheme | None:
        """The most similar supported scheme; None if only another kind of number is supported.

        Zero points and rounded activations are given up last, and rather more bits are taken than fewer.
        """
        grid = scheme.weights
        tried = [
            replace(sized, activations=activations).with_integers(bits, symmetric=symmetric)
            for activations in dict.fromkeys((scheme.activations, None))
            for symmetric in sorted({grid.symmetric, True})
            for bits in self._bits_near(grid.bits)
            for sized in (scheme, *(scheme.with_group(group) for group in self._groups_near(grid.group, inputs)))
        ]
        tried = [each.with_positive_scales() if self.positive_scales else each for each in tried]
        return next((each for each in tried if self.problem(each, inputs) is None), None)

    def _bits_near(self, bits: int) -> list[int]:
        return sorted(self.bits or {bits}, key=lambda other: (abs(other - bits), -other))

    def _groups_near(self, group: int | None, inputs: int) -> list[int | None]:
        """Powers of two and what the target names, nearest first, longer ones last; then the whole row."""
        wanted = group or inputs
        known = self.groups or {1 << power for power in range(4, wanted.bit_length())}
        dividing = [other for other in known if inputs % other == 0 or self.ragged_groups]
        return [*sorted(dividing, key=lambda other: (other > wanted, abs(other - wanted))), None]


def group_of(scheme: Scheme, inputs: int) -> int | None:
    """Inputs that share a scale; None if the whole row does."""
    group = scheme.weights.group
    return group if group is not None and group <= inputs else None
