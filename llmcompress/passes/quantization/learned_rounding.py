"""Learned rounding: whether each weight is rounded up or down, learned block by block. O = outputs, I = inputs, G =
groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.rounded_inputs import fixed_scale, round_inputs
from llmcompress.modules.scheme import DESCRIPTION, Scheme, named_scheme
from llmcompress.numerics.fake_quant import rounded_integers, storable_scales, storable_zeros
from llmcompress.numerics.grid import Fitted, round_to_codes, spread
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.statistics import AbsMax, Gram, Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.block_training import BlockTraining, LeastError
from llmcompress.passes.quantizing import QuantizingPass, put_codes, report_row
from llmcompress.records.rows import SiteReport

_NARROWEST, _WIDEST = 0.7, 1.2
"""How far a scale may move from where the search of ranges left it."""


@PASSES.register("learned_rounding")
class LearnedRounding(QuantizingPass):
    """Learn whether to round each weight up or down, and each scale, to minimize the block's output error on
    calibration data.

    The block's inputs come from the compressed blocks before it; its targets are the dense model's outputs. Each step
    uses a few windows (per process) and moves all offsets and scales against the sign of their gradients, with a
    learning rate that falls to zero. The step with the least error on held-out windows is kept; a block where none
    improves on rounding to nearest is rounded to nearest. Better at 2 and 3 bits than methods that treat one linear at
    a time, at dozens of times the cost.

    Source: Cheng et al., arXiv 2309.05516 (SignRound). Differs: ranges are first searched on Gram matrices, and scales
    are learned around them; each token's error is relative to its norm; a step uses one window, not eight, so 200 steps
    cost as much as 25 do there.
    """

    sitewise: ClassVar[bool] = False
    whole_block: ClassVar[frozenset[str]] = frozenset({"steps", "windows", "rate"})

    steps: int = Field(200, ge=1, description="optimization steps per block")
    windows: int = Field(1, ge=1, description="windows per step")
    rate: float | None = Field(None, gt=0, le=1, description="initial learning rate (1 ÷ steps)")

    @field_validator("scheme")
    @classmethod
    def _integers(cls, name: str) -> str:
        scheme = named_scheme(name)
        if scheme.weights.number is not None:
            raise ValueError(f"rounding is learned on integer grids, and {name} is none: {DESCRIPTION}")
        return scheme.name

    def needs(self) -> tuple[type[Statistic], ...]:
        """Gram matrices for the first ranges."""
        return (Gram, *self.activation_statistics())

    def wants_dense(self) -> bool:
        """What the block is to give."""
        return True

    def trained_windows(self) -> int:
        """Of all steps."""
        return self.steps * self.windows

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Learn all sites of the block together."""
        schemes = {
            site: scheme for site in sites if (scheme := self.scheme_for(site.name, site.info.inputs)) is not None
        }
        if not schemes:
            return []
        dense = {site: site.module for site in schemes}
        learning = {site: _Learning(site, scheme) for site, scheme in schemes.items()}
        for site, module in learning.items():
            site.replace(module)
        least = self._learn(BlockTraining(block, windows=self.windows), list(learning.values()))
        failed = "learned rounding did worse than rounding to nearest: rounded to nearest"
        rows = []
        for site, module in learning.items():
            site.replace(dense[site])
            put_codes(site, schemes[site], *module.codes())
            rows.append(
                report_row(
                    site,
                    schemes[site],
                    "learned_rounding",
                    error=least.error,
                    error_before=least.first,
                    tokens=site.statistic(Gram).tokens,
                    degraded=None if least.error < least.first else failed,
                )
            )
        return rows

    def _learn(self, training: BlockTraining, modules: Sequence[_Learning]) -> LeastError:
        parameters = [parameter for module in modules for parameter in (module.offset_OI, module.stretch_OG)]
        first = self.rate or 1 / self.steps
        least = LeastError(parameters, training.error())
        for step, part in training.steps(self.steps, "learned_rounding"):
            gradients = training.gradients(part, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient.sign_(), alpha=first * (1 - step / self.steps))
            for module in modules:
                module.confine()
            if training.looks_after(step, self.steps):
                least.see(training.error())
        least.restore()
        return least


class _Learning(nn.Module):
    """Replaces a linear while its rounding is learned."""

    def __init__(self, site: LinearSite, scheme: Scheme) -> None:
        super().__init__()
        self._weight_OI, self._bias_O, self._scheme = site.weight_OI, site.bias_O, scheme
        gram_II = site.statistic(Gram).sum_II
        self._first = fit(
            self._weight_OI, scheme.weights, scale_dtype=site.storage_dtype, search="mse", gram_II=gram_II
        )
        self._storage_dtype = site.storage_dtype
        self.offset_OI = nn.Parameter(torch.zeros_like(self._weight_OI))
        self.stretch_OG = nn.Parameter(torch.ones_like(self._first.scale_OG))
        self._input_scale = fixed_scale(site.statistic(AbsMax).max_I.max(), scheme) if scheme.measures_inputs else None

    def forward(self, x: Tensor) -> Tensor:
        """What the rounded linear computes; gradients pass through both roundings as if they were not there."""
        if self._scheme.activations:
            x = round_inputs(x, self._scheme, self._input_scale)
        return functional.linear(x, self._rounded(), self._bias_O)

    @torch.no_grad()
    def confine(self) -> None:
        """Offsets never pass over a code, zeros of an earlier pass stay zero, scales stay near the searched ones."""
        self.offset_OI.clamp_(-0.5, 0.5).masked_fill_(self._weight_OI == 0, 0.0)
        self.stretch_OG.clamp_(_NARROWEST, _WIDEST)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Fitted]:
        """What is stored."""
        scale_OG = self._scale_OG()
        fitted = replace(self._first, scale_OG=scale_OG, zero_OG=self._zero_OG(scale_OG))
        scale_OI = spread(fitted.scale_OG, fitted.grid, self._weight_OI.shape[1])
        return round_to_codes(self._weight_OI + self.offset_OI * scale_OI, fitted), fitted

    def _scale_OG(self) -> Tensor:
        first = self._first
        stretched_OG = first.scale_OG * self.stretch_OG
        return storable_scales(stretched_OG, first.scale_OG, first.grid, self._storage_dtype, first.shared)

    def _zero_OG(self, scale_OG: Tensor) -> Tensor:
        return storable_zeros(self._first.zero_OG, scale_OG, self._first.grid, self._first.shared)

    def _rounded(self) -> Tensor:
        grid, inputs = self._first.grid, self._weight_OI.shape[1]
        scale_OG = self._scale_OG()
        scale_OI = spread(scale_OG, grid, inputs)
        zero_OI = spread(self._zero_OG(scale_OG), grid, inputs)
        exact_OI = self._weight_OI / scale_OI + zero_OI + self.offset_OI
        return (rounded_integers(exact_OI, grid.low, grid.high) - zero_OI) * scale_OI
