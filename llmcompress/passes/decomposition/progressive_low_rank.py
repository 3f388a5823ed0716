"""Low rank in several small cuts, each followed by a short training of the factors. R = rank, K = min(O, I)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from torch import nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.modules.low_rank import factors_of
from llmcompress.numerics.low_rank import break_even
from llmcompress.passes.base import PASSES, Backward, ModelPass, Trait
from llmcompress.passes.decomposition.ranks import RankRule
from llmcompress.passes.decomposition.svd import SingularValues
from llmcompress.records.rows import SiteReport
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.settings import Training


@PASSES.register("progressive_low_rank")
class ProgressiveLowRank(ModelPass):
    """Low-rank factors as in `svd`, but ranks decrease in equal steps from full rank and the factors are trained in
    between.

    `fraction` of the parameters of the selected sites is REMOVED; the training steps are divided equally among the
    cuts.

    Source: the idea of PLRD (progressive low-rank decomposition), which publishes no details; the cut itself is that of
    SVD-LLM, arXiv 2403.07378.
    """

    leaves: ClassVar[frozenset[Trait]] = SingularValues.leaves
    conflicts: ClassVar[Mapping[Trait, str]] = SingularValues.conflicts

    fraction: float = Field(0.2, gt=0, lt=1, description="fraction of the parameters to remove")
    cuts: int = Field(
        4, ge=1, le=100, description="how often ranks are cut; training is divided equally among the cuts"
    )
    ranks: RankRule = Field(
        "loss", description="the same fraction everywhere; energy: least output error; loss: least rise of the loss"
    )
    round_to: int = Field(1, ge=1, description="final ranks are multiples of this, at least one multiple")
    sites: tuple[str, ...] = Field(("*",), description="globs of the module names to compress")
    exclude: tuple[str, ...] = Field((), description="globs of the module names to skip")
    training: Training = Field(default_factory=Training, description="total steps, learning rate and batches")

    @field_validator("sites", "exclude", mode="before")
    @classmethod
    def _one_glob(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _every_cut_trains(self) -> Self:
        if self.training.steps < self.cuts:
            raise ValueError(
                f"{self.cuts} cuts need at least {self.cuts} training steps, and there are only {self.training.steps}"
            )
        return self

    @override
    def selects(self, site: str) -> bool:
        return self._svd().selects(site)

    @override
    def names_after(self, site: str) -> tuple[str, ...]:
        return self._svd().names_after(site)

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """The fraction is one of parameters."""
        return 1 - self.fraction

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def check(self, model_map: ModelMap) -> None:
        if not any(self.selects(name) for name in model_map.site_names()):
            raise CompressError(
                "recipe.no-such-site",
                "`sites` and `exclude` select no linear",
                where="progressive_low_rank",
                fix="`llmcompress inspect MODEL` lists the names of sites",
                exit_code=ExitCode.USAGE,
            )

    @override
    def backward(self) -> Backward | None:
        training = self.training
        return Backward(of_all=3, windows=training.batch, trained_on=training.windows, lowered=training.lowered)

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        svd = self._svd()
        decided = svd.decide(whole)
        goals = {
            site.name: rank
            for site in whole.sites()
            if svd.selects(site.name)
            and (rank := svd.rank_of(site, decided)) < break_even(site.info.outputs, site.info.inputs)
        }
        done = 0
        for cut in range(1, self.cuts + 1):
            self._cut(whole, svd, goals, cut)
            until = round(self.training.steps * cut / self.cuts)
            self._train(whole, goals, until - done, cut)
            done = until
        return [
            self._row(site.name, goals.get(site.name), site.info.outputs, site.info.inputs)
            for site in whole.sites()
            if svd.selects(site.name)
        ]

    def _cut(self, whole: WholeModel, svd: SingularValues, goals: Mapping[str, int], cut: int) -> None:
        """Lower all ranks by one part of the way; inputs are those that the cut blocks before give."""
        for block in whole.stream():
            sites = [site for site in block.sites if site.name in goals]
            if sites:
                block.measure(sites, svd.needs())
            for site in sites:
                full, goal = min(site.info.outputs, site.info.inputs), goals[site.name]
                svd.factor(site, full - round((full - goal) * cut / self.cuts))
            block.forget()

    def _train(self, whole: WholeModel, goals: Mapping[str, int], steps: int, cut: int) -> None:
        settings = self.training.model_copy(update={"steps": steps})
        context = replace(whole.context, seed=whole.context.seed + cut)
        with whole.resident() as model:
            factors = [weight for name in goals for weight in _weights(model.get_submodule(name))]
            job = Job(f"train after cut {cut} of {self.cuts}", parameters=factors)
            train(model, Windows(context.windows_NT), settings, context, job=job)

    def _svd(self) -> SingularValues:
        return SingularValues.model_validate(
            {
                "fraction": self.fraction,
                "ranks": self.ranks,
                "round_to": self.round_to,
                "sites": self.sites,
                "exclude": self.exclude,
            }
        )

    def _row(self, name: str, rank: int | None, outputs: int, inputs: int) -> SiteReport:
        parameters = outputs * inputs if rank is None else rank * (outputs + inputs)
        why = None if rank else "kept dense: two factors of its rank would not be smaller"
        return SiteReport(site=name, algorithm="progressive_low_rank", rank=rank, parameters=parameters, degraded=why)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    factors = factors_of(module)
    assert factors is not None
    left_OR, right_RI = factors
    return [right_RI, left_OR]
