"""Codes, scales and norm weights learned block by block from another quantizer's codes. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import QuantLinear, codes_of
from llmcompress.numerics.fake_quant import storable_scales, storable_zeros, straight_through
from llmcompress.numerics.grid import flat, grouped, spread
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.relaxed_codes import drawn_offset, first_position, logistic_noise
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.block_training import BlockTraining, Group, LeastError, Steps, norms_of, trained
from llmcompress.passes.quantization.learned_codes import FIRST_CODES, LearnedCodes, with_errors
from llmcompress.records.rows import SiteReport

_STRETCH = 0.3
"""How far a scale may move, as a share of what it was."""
_SHARPNESS = (12.0, 40.0)
"""Of the drawn codes, from the first step to the last."""
_SCALE_RATE = 0.1
"""Rate of scales, as a share of themselves, beside that of codes; norm weights have the same rate as codes."""


@PASSES.register("gsq")
class GSQ(LearnedCodes):
    """Start from another quantizer's codes; learn neighbouring codes, scales and norm weights to minimize the block's
    output error.

    The block's inputs come from the compressed blocks before it; its targets are the dense model's outputs. The step
    with the least error on held-out windows is kept, the start included, so no block gets worse on them. The result is
    an ordinary grid. Errors in the report are the block's; `error_before` is that of the first codes.

    Source: arXiv 2604.18556 (GSQ). Differs: gradients pass straight through the rounding; Gumbel noise is an option,
    which takes more steps; errors of a token are relative to its length; norms that feed nothing else are tuned too.
    """

    whole_block: ClassVar[frozenset[str]] = FIRST_CODES | {"rate", "relaxation", "tune_norms"}

    rate: float = Field(0.006, gt=0, le=1, description="learning rate of codes, in steps of the grid")
    relaxation: Literal["straight_through", "gumbel"] = Field(
        "straight_through",
        description="straight_through: gradients ignore the rounding; gumbel: codes are sampled from their neighbours",
    )
    tune_norms: bool = Field(True, description="also train the weights of norms whose only consumers are these sites")

    @override
    def learned(
        self, block: BlockWork, sites: Sequence[LinearSite], quantize: Callable[[], list[SiteReport]]
    ) -> list[SiteReport]:
        norms = norms_of(block, sites) if self.tune_norms else []
        weights = {site: (site.weight_OI, site.pruned_OI) for site in sites}
        rows = quantize()
        learning = {
            site: CodesInTraining(codes_of(site.module), weight_OI, pruned_OI, site.storage_dtype)
            for site, (weight_OI, pruned_OI) in weights.items()
            if site.is_compressed
        }
        if not learning:
            return rows
        for site, module in learning.items():
            site.replace(module)
        least = self._learn(block, list(learning.values()), norms)
        for site, module in learning.items():
            site.replace(module.settled())
        return with_errors(rows, "gsq", learning, least)

    def _learn(self, block: BlockWork, modules: Sequence[CodesInTraining], norms: Sequence[nn.Parameter]) -> LeastError:
        training = BlockTraining(block, windows=self.windows)
        groups = [
            Group([each.latent_OI for each in modules], self.rate),
            Group([each.stretch_OG for each in modules], _SCALE_RATE * self.rate),
            *(Group([norm], self.rate * float(norm.detach().abs().mean())) for norm in norms),
        ]

        def draw(step: int) -> None:
            for module in modules:
                module.draw(self._sharpness(step), training.generator)

        def confine() -> None:
            for module in modules:
                module.confine()

        return trained(
            training,
            groups,
            Steps("gsq", self.steps, before=draw, after=confine),
            error=lambda: _measured(training, modules, norms),
        )

    def _sharpness(self, step: int) -> float | None:
        if self.relaxation == "straight_through":
            return None
        first, last = _SHARPNESS
        return float(first * (last / first) ** (step / self.steps))


class CodesInTraining(nn.Module):
    """Stands in for a linear while its codes and scales are learned.

    `latent_OI` says where between the first code's neighbours a weight is: the code that will be stored is the nearest.
    """

    def __init__(self, module: QuantLinear, weight_OI: Tensor, pruned_OI: Tensor, storage_dtype: torch.dtype) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple: its numbers are no part of what is trained
        fitted = module.quantized.fitted
        work = torch.float32
        self._first = replace(fitted, scale_OG=fitted.scale_OG.to(work), zero_OG=fitted.zero_OG.to(work))
        self._dtype = storage_dtype
        grid, inputs = fitted.grid, weight_OI.shape[1]
        self._codes_OI = module.codes_OI.to(work)
        self._pruned_OI = pruned_OI
        exact_OI = weight_OI / spread(self._first.scale_OG, grid, inputs) + spread(self._first.zero_OG, grid, inputs)
        self.latent_OI = nn.Parameter(first_position(exact_OI - self._codes_OI))
        self.stretch_OG = nn.Parameter(torch.ones_like(self._first.scale_OG))
        self._drawn: tuple[float, tuple[Tensor, Tensor]] | None = None
        self.settling = False
        self.confine()

    def draw(self, sharpness: float | None, generator: torch.Generator) -> None:
        """New noise for the next forwards; without a sharpness codes are rounded, and gradients pass through."""
        if sharpness is not None:
            count, shape, device = self.latent_OI.numel(), self.latent_OI.shape, self.latent_OI.device
            up, down = (logistic_noise(count, generator).view(shape).to(device) for _ in range(2))
            self._drawn = (sharpness, (up, down))

    @torch.no_grad()
    def confine(self) -> None:
        """Codes stay within reach of the first, zeros of an earlier pass stay zero, scales stay near and keep signs."""
        self.latent_OI.clamp_(-1.49, 1.49).masked_fill_(self._pruned_OI, 0.0)
        self.stretch_OG.clamp_(1 - _STRETCH, 1 + _STRETCH)

    def forward(self, x: Tensor) -> Tensor:
        """What the linear computes with the codes as they are drawn, or, when settling, as they would be stored."""
        return self._module[0].computed(x, self._weight_OI(), self._module[0].bias)

    def _weight_OI(self) -> Tensor:
        grid = self._first.grid
        codes_OI = self._codes_OI + self._offset_OI()
        scale_OG = self._scale_OG()
        zero_OG = storable_zeros(self._first.zero_OG, scale_OG, grid, self._first.shared)
        centred_OGN = grouped(codes_OI.clamp(grid.low, grid.high), grid) - zero_OG[..., None]
        return flat(centred_OGN * scale_OG[..., None], codes_OI.shape[1])

    def _offset_OI(self) -> Tensor:
        if self.settling or self._drawn is None:
            return straight_through(self.latent_OI, self.latent_OI.detach().round())
        offset_OI = drawn_offset(self.latent_OI, *self._drawn)
        return offset_OI.masked_fill(self._pruned_OI, 0.0)

    def _scale_OG(self) -> Tensor:
        first = self._first
        stretched_OG = first.scale_OG * self.stretch_OG
        return storable_scales(stretched_OG, first.scale_OG, first.grid, self._dtype, first.shared)

    @torch.no_grad()
    def settled(self) -> QuantLinear:
        """The linear with what was learned."""
        grid, module = self._first.grid, self._module[0]
        codes_OI = (self._codes_OI + self.latent_OI.round()).clamp(grid.low, grid.high).to(torch.int8)
        fitted = replace(self._first, scale_OG=self._scale_OG())
        return module.with_codes(QuantizedTensor.of(codes_OI, fitted), module.bias)


def _measured(training: BlockTraining, modules: Sequence[CodesInTraining], norms: Sequence[nn.Parameter]) -> float:
    """The block's error with everything as it would be stored."""
    for module in modules:
        module.settling = True
    error = training.stored_error(norms)
    for module in modules:
        module.settling = False
    return error
