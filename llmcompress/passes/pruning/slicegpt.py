"""SliceGPT: rotates the residual stream into its principal directions and removes the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.formats.named import Kind
from llmcompress.model.embedding_norm import bake_embedding_norm
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.residual_probe import find_residual
from llmcompress.passes.base import PASSES, ModelPass, Trait
from llmcompress.passes.pruning.shortcuts import slice_with_shortcuts
from llmcompress.passes.pruning.slicing import BasisName, Slicing, slice_globally
from llmcompress.records.rows import SiteReport

FORMS = {"global": slice_globally, "shortcuts": slice_with_shortcuts}


@PASSES.register("slicegpt")
class SliceGPT(ModelPass):
    """Remove channels of the residual stream: all linears that read or write it get smaller; heads and FFN channels
    stay.

    `form: global` uses one basis for the whole stream and gives an ordinary smaller model. `form: shortcuts` is the
    paper's: a separate basis after every addition, and a matrix on every skip connection between two of them.

    Source: Ashkboos et al., arXiv 2401.15024. Differs: the paper has no global form; tokens are normalized to unit
    length, as norms see them; the mean is removed only where norms subtract it; there is no damping before the
    decomposition, which would not change any direction.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"shapes"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would fill the zeros: a rotation mixes all channels",
        "pattern": "would fill the zeros: a rotation mixes all channels",
        "tables": "needs an ordinary embedding and output head to rotate",
    }

    fraction: float = Field(0.25, ge=0, lt=1, description="fraction of the residual stream's channels to remove")
    form: Literal["global", "shortcuts"] = Field(
        "global",
        description="global: one basis, an ordinary smaller model; shortcuts: a basis after every addition, as in the "
        "paper: better at equal width, but larger, and loads only with our plug-in",
    )
    basis: BasisName = Field("pca", description="pca: principal directions; random: for comparison")
    round_to: int = Field(8, ge=1, description="round the remaining width down to a multiple of this")
    refit: bool | None = Field(
        None, description="form: global; refit the linears that read the stream by least squares (true)"
    )
    damping: float | None = Field(
        None, gt=0, le=1, description="form: global; ridge of that refit, as a fraction of the mean diagonal (0.001)"
    )

    @model_validator(mode="after")
    def _only_global_is_refitted(self) -> Self:
        if self.form != "global" and (self.refit is not None or self.damping is not None):
            raise ValueError("`refit` and `damping` apply to `form: global` only")
        return self

    @override
    def uses_data(self) -> bool:
        """Not for a random basis, unless what reads it is refitted."""
        return self.basis == "pca" or (self.form == "global" and self.refit is not False)

    @override
    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """Every linear reads or writes the stream on one side."""
        return self._width(model_map.hidden_size) / model_map.hidden_size

    @override
    def tensors_outside(self, tensors: Mapping[str, Kind], model_map: ModelMap, dtype: torch.dtype) -> dict[str, Kind]:
        """Norms and tables are as wide as the stream; the last norm moves into the head, so no head stays tied."""
        before, found = model_map.hidden_size, model_map.with_own_head(tensors)
        width = self._width(before)
        return {
            name: (kind, tuple(width if size == before else size for size in shape))
            for name, (kind, shape) in found.items()
        }

    @override
    def rotates_stream(self) -> bool:
        return True

    @override
    def notes(self, model_map: ModelMap) -> list[str]:
        """What a head of its own costs, and which fraction would reach what was asked for."""
        if not model_map.tied or self.fraction == 0:
            return []
        blocks = sum(site.outputs * site.inputs for block in model_map.blocks for site in block.structure.sites)
        table = model_map.vocabulary * model_map.hidden_size
        left = (blocks + 2 * table) * self._width(model_map.hidden_size) / model_map.hidden_size / (blocks + table)
        needed = 1 - (1 - self.fraction) * (blocks + table) / (blocks + 2 * table)
        change = f"shrink by {1 - left:.0%} only" if left < 1 else f"grow by {left - 1:.0%}"
        return [
            f"slicegpt, {self.fraction:.0%} asked for: the embedding ({table / (blocks + table):.0%} of the weights) "
            f"is the head too, and in a rotated stream each needs a table of its own, so the weights {change}; "
            f"`fraction: {needed:.2f}` reaches {self.fraction:.0%}, and `width` needs no second table"
        ]

    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Find who reads and writes the stream, prove it by mirroring it, then slice.

        Raises: CompressError where a change of basis is not exact, or nothing would be left.
        """
        whole.model.float()
        bake_embedding_norm(whole.model)
        residual = find_residual(whole.model)
        width = self._width(residual.width)
        damping = 0.001 if self.damping is None else self.damping
        slicing = Slicing(width, self.basis, None if self.refit is False else damping)
        return FORMS[self.form](whole, residual, slicing)

    def _width(self, before: int) -> int:
        if self.fraction == 0:
            return before
        width = int((1 - self.fraction) * before) // self.round_to * self.round_to
        if width < 2:
            raise CompressError(
                "slicegpt.nothing-left",
                f"{1 - self.fraction:.0%} of {before} channels is less than `round_to: {self.round_to}`",
                where="slicegpt",
                fix="lower `fraction` or `round_to`",
                exit_code=ExitCode.USAGE,
            )
        return width
