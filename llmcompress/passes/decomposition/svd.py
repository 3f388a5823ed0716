"""Low-rank factorization: two linears replace one, with the least output error. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.low_rank import LowRankLinear, factors_of
from llmcompress.numerics.low_rank import (
    Factors,
    best_left,
    break_even,
    output_spectrum,
    relative_output_error,
    truncate,
)
from llmcompress.numerics.rank_allocation import uniform_rank
from llmcompress.numerics.statistics import AbsMean, Gram, Statistic
from llmcompress.passes.base import PASSES, Backward, BlockPass, Trait
from llmcompress.passes.decomposition.ranks import RankRule, decide_ranks
from llmcompress.records.rows import SiteReport

Whitening = Literal["none", "activation", "gram"]


@PASSES.register("svd")
class SingularValues(BlockPass):
    """Factor every site into two linears.

    `fraction` of the parameters of the selected sites is REMOVED. Sites that would not get smaller are kept dense.

    Source: Wang et al., arXiv 2403.07378 (SVD-LLM: `gram`, `refit`); Yuan et al., arXiv 2312.05821 (ASVD:
    `activation`). Differs: no matrix is inverted (`numerics/low_rank.py`), so no damping is needed; inputs are those
    that the compressed blocks before it produce.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"factors"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would replace zeros by the product of two dense factors",
        "pattern": "would replace zeros by the product of two dense factors",
        "factors": "would factor low-rank factors again",
    }
    decides: ClassVar[bool] = True
    changes_sites: ClassVar[bool] = True
    whole_block: ClassVar[frozenset[str]] = frozenset({"whitening", "alpha", "ranks", "refit"})

    fraction: float | None = Field(
        None, gt=0, lt=1, description="fraction of the parameters to remove (0.2 if no rank is given)"
    )
    rank: int | None = Field(None, ge=1, description="instead of `fraction`: this rank for every site")
    whitening: Whitening = Field(
        "gram", description="weighting of the inputs: none, mean magnitude (ASVD), Gram matrix (SVD-LLM)"
    )
    alpha: float | None = Field(None, gt=0, le=2, description="whitening: activation; exponent of the magnitude (0.5)")
    ranks: RankRule | None = Field(
        None,
        description="uniform: the same fraction everywhere; energy: least output error; loss: least rise of the loss",
    )
    round_to: int = Field(1, ge=1, description="ranks are multiples of this, at least one multiple")
    refit: bool = Field(False, description="refit the left factors to the inputs of the compressed model")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rank is not None and self.fraction is not None:
            raise ValueError("give `fraction` or `rank`, not both (set the other to null)")
        if self.rank is not None and self.ranks not in (None, "uniform"):
            raise ValueError(f"`rank` fixes every rank: `ranks: {self.ranks}` needs a `fraction`")
        if self.alpha is not None and self.whitening != "activation":
            raise ValueError("`alpha` belongs to `whitening: activation`")
        return self

    @property
    def keep(self) -> float:
        """Fraction of a site's parameters that its factors may have."""
        return 1 - (0.2 if self.fraction is None else self.fraction)

    @property
    def rule(self) -> RankRule:
        """How ranks are found. `loss` is the default because it was measured best (evals/low_rank.py)."""
        return self.ranks or ("loss" if self.rank is None else "uniform")

    def names_after(self, site: str) -> tuple[str, ...]:
        """Two linears below the site's own name."""
        return (f"{site}.right", f"{site}.left")

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """What the rank leaves, or the uniform rank of the fraction: ranks by loss or energy have as many parameters
        together. Never more than the dense site."""
        here, both = self.for_site(site), info.outputs + info.inputs
        rank = here.rank or uniform_rank(info.outputs, info.inputs, here.keep, here.round_to)
        return min(1.0, rank * both / (info.outputs * info.inputs))

    def uses_data(self) -> bool:
        """Plain singular values of the weights need none."""
        return bool(self.needs()) or self.rule == "loss" or self.refit

    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistic of the metric."""
        kinds: dict[Whitening, tuple[type[Statistic], ...]] = {"none": (), "activation": (AbsMean,), "gram": (Gram,)}
        return kinds[self.whitening]

    def forwards(self) -> int:
        """Ranks that depend on each other take a stream of their own, the refit a measurement for every input."""
        return super().forwards() + 2 * (self.rule != "uniform") + 4 * self.refit

    def backward(self) -> Backward | None:
        """For ranks by loss; weights and the bases of their spectra wait in the run folder. A run without one keeps
        them in memory: about one and a half copies of the selected weights."""
        return Backward(recomputes=True) if self.rule == "loss" else None

    @override
    def forwards_through_model(self, blocks: int) -> tuple[float, float]:
        """Ranks by loss are compared with uniform ones by perplexity."""
        return (2.0, 2.0) if self.rule == "loss" else (0.0, 0.0)

    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """The rank of every site, where that depends on all the others."""
        return {} if self.rule == "uniform" else decide_ranks(self, whole)

    @override
    def with_decisions(self, decisions: Mapping[str, Tensor]) -> Self:
        of_site = {site: {"fraction": None, "rank": int(rank)} for site, rank in decisions.items()}
        return self.with_site_options({"ranks": "uniform"}, of_site)

    def metric(self, site: LinearSite) -> Tensor | None:
        """The measured metric of the site's inputs; None without whitening or tokens."""
        if not self.needs() or site.statistic(self.needs()[0]).tokens == 0:
            return None
        if self.whitening == "gram":
            return site.statistic(Gram).sum_II
        alpha = 0.5 if self.alpha is None else self.alpha
        return site.statistic(AbsMean).mean_I.pow(2 * alpha)

    def rank_of(self, site: LinearSite, decisions: Mapping[str, Tensor]) -> int:
        """The decided rank, else the one that the options of the site give."""
        if site.name in decisions:
            return int(decisions[site.name])
        here = self.for_site(site.name)
        outputs, inputs = site.info.outputs, site.info.inputs
        if here.rank is not None:
            return min(here.rank, outputs, inputs)
        return uniform_rank(outputs, inputs, here.keep, here.round_to)

    def run(self, block: BlockWork) -> list[SiteReport]:
        """Factor all sites; with `refit`, then fit the left factors again, in order of execution."""
        weights = {site.name: site.weight_OI for site in block.sites if self.refit and self.selects(site.name)}
        rows = super().run(block)
        return _refitted(block, weights, rows) if self.refit else rows

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Factor every site separately."""
        rows = []
        for site in sites:
            block.context.progress.substep(f"svd {site.info.name}")
            rows.append(self._compress(site, self.rank_of(site, block.decisions)))
        return rows

    def factor(self, site: LinearSite, rank: int) -> Factors:
        """Replace the measured site by its best factors of that rank."""
        weight_OI = site.weight_OI
        factors = truncate(weight_OI, output_spectrum(weight_OI, self.metric(site)), rank)
        site.replace(LowRankLinear.from_factors(factors.left_OR, factors.right_RI, site.bias_O))
        return factors

    def _compress(self, site: LinearSite, rank: int) -> SiteReport:
        outputs, inputs = site.info.outputs, site.info.inputs
        tokens = site.statistic(self.needs()[0]).tokens if self.needs() else None
        if rank >= break_even(outputs, inputs):
            why = f"kept dense: two factors of rank {rank} would not be smaller"
            parameters = outputs * inputs
            return SiteReport(site=site.name, algorithm="svd", parameters=parameters, tokens=tokens, degraded=why)
        weight_OI = site.weight_OI
        factors = self.factor(site, rank)
        seen = self.whitening == "gram" and bool(tokens)
        return SiteReport(
            site=site.name,
            algorithm="svd",
            rank=rank,
            parameters=rank * (outputs + inputs),
            error=relative_output_error(weight_OI, factors.product(), site.statistic(Gram).sum_II) if seen else None,
            tokens=tokens,
            degraded="no tokens reached it: plain singular values" if tokens == 0 else None,
        )


@torch.no_grad()
def _refitted(block: BlockWork, weights: Mapping[str, Tensor], rows: list[SiteReport]) -> list[SiteReport]:
    """Left factors that lose least on what the factored linears before them in the block now give."""
    errors: dict[str, float] = {}
    for group in block.input_groups():
        sites = [site for site in group if site.name in weights and factors_of(site.module)]
        if not sites:
            continue
        block.measure(sites, (Gram,))
        for site in sites:
            factors, gram = factors_of(site.module), site.statistic(Gram)
            assert factors is not None
            left_OR, right_RI = factors
            if gram.tokens:
                left_OR.copy_(best_left(weights[site.name], right_RI, gram.sum_II))
            errors[site.name] = relative_output_error(weights[site.name], left_OR @ right_RI, gram.sum_II)
        block.forget()
    return [row.model_copy(update={"error": errors[row.site]}) if row.site in errors else row for row in rows]
