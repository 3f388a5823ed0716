"""SliceGPT: the residual stream in a basis of principal directions, of which the last ones are left out."""

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
    """Fewer channels in the residual stream: everything that reads or writes it gets smaller, attention and FFN do not.

    `form: global` gives the whole stream one basis and cuts it once: an ordinary smaller model. `form: shortcuts` is
    the paper's: a basis of its own after every addition, and a matrix on every skip that leads from one to the next.

    Source: Ashkboos et al., arXiv 2401.15024. Differs: the paper knows no global form; tokens count at unit length, as
    norms see them; the mean is taken out of what is written only where norms subtract it; nothing is damped before the
    decomposition, which would change no direction.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"shapes"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would fill the zeros: a rotation mixes all channels",
        "pattern": "would fill the zeros: a rotation mixes all channels",
        "tables": "needs to rotate an embedding and a head that are ordinary tables",
    }

    fraction: float = Field(0.25, ge=0, lt=1, description="share of the channels of the residual stream to remove")
    form: Literal["global", "shortcuts"] = Field(
        "global",
        description="global: one basis, an ordinary smaller model; shortcuts: one after every addition, as in the "
        "paper: better at equal width, but larger, and only our plug-in loads it",
    )
    basis: BasisName = Field("pca", description="pca: principal directions; random: for comparison")
    round_to: int = Field(8, ge=1, description="the width that stays is rounded down to a multiple of this")
    refit: bool | None = Field(
        None, description="form: global; what reads the stream makes up by least squares for what norms lose (true)"
    )
    damping: float | None = Field(
        None, gt=0, le=1, description="form: global; of the least squares, as a share of the mean diagonal (0.001)"
    )

    @model_validator(mode="after")
    def _only_global_is_refitted(self) -> Self:
        if self.form != "global" and (self.refit is not None or self.damping is not None):
            raise ValueError("`refit` and `damping` belong to `form: global`: a basis per norm leaves nothing to refit")
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
    def tensors_outside(
        self, tensors: Mapping[str, Kind], model_map: ModelMap, storage_dtype: torch.dtype
    ) -> dict[str, Kind]:
        """Norms and tables are as wide as the stream; the last norm moves into the head, so no head stays tied."""
        before, found = model_map.hidden_size, dict(tensors)
        if model_map.tied:
            found[f"{model_map.head}.weight"] = tensors[f"{model_map.embedding}.weight"]
        width = self._width(before)
        return {
            name: (kind, tuple(width if size == before else size for size in shape))
            for name, (kind, shape) in found.items()
        }

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
                f"{1 - self.fraction:.0%} of {before} channels are less than `round_to`: {self.round_to}",
                where="slicegpt",
                fix="remove less, or set a smaller `round_to`",
                exit_code=ExitCode.USAGE,
            )
        return width
