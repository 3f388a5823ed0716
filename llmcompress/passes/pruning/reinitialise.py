"""Resets the model to fresh random weights from its own initialization code, for training from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.passes.base import PASSES, ModelPass, Trait
from llmcompress.records.rows import SiteReport

_FIRST = "would discard the work of earlier passes: put it first"


@PASSES.register("reinitialise")
class Reinitialise(ModelPass):
    """Replace all weights by the model's own random initialization; nothing of the trained model remains.

    With `keep_zeros` exact zeros stay zero: the control experiment for lottery tickets, which claim that the same mask
    is worth less with other weights.
    """

    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": _FIRST,
        "pattern": _FIRST,
        "factors": _FIRST,
        "shapes": _FIRST,
    }

    seed: int = Field(0, ge=0, description="standard deviation of the random weights")
    keep_zeros: bool = Field(False, description="keep exact zeros of the linears")

    @override
    def uses_data(self) -> bool:
        return False

    @override
    def conflict_with(self, trait: Trait) -> str | None:
        return None if self.keep_zeros and trait in ("zeros", "pattern") else super().conflict_with(trait)

    @override
    @torch.no_grad()
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        zeros = {site.name: site.weight_OI == 0 for site in whole.sites()} if self.keep_zeros else {}
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            fresh = type(whole.model)(whole.model.config)
        whole.model.load_state_dict(fresh.state_dict())
        for site in whole.sites():
            if site.name in zeros:
                site.write(site.weight_OI.masked_fill(zeros[site.name], 0))
        return [SiteReport(site=name, algorithm="reinitialise") for name in whole.map.site_names()]
