"""What unstructured and N:M sparsity passes share: how many zeros, in which pattern, and where. O = outputs, I =
inputs.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.model.site import LinearSite
from llmcompress.numerics.masks import (
    Pattern,
    count_of_zeros,
    lowest,
    lowest_per_group,
    lowest_per_row,
    named_pattern,
    zeros_first,
)
from llmcompress.passes.base import Backward, BlockPass, Trait
from llmcompress.passes.baselines import with_options_of
from llmcompress.passes.pruning.sparse_counts import decide_shares

Allocation = Literal["uniform", "outliers", "loss"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A block or expert in a site's name: the error lists kinds of sites, not every one of thousands."""


_ALMOST_ALL = math.nextafter(1.0, 0.0)
"""The largest sparsity that may be asked for; rounded to whole weights it is all of them."""


class SparsePass(BlockPass):
    """A pass that sets weights to zero without changing shapes; later passes keep exact zeros."""

    leaves: ClassVar[frozenset[Trait]] = frozenset({"zeros"})
    decides: ClassVar[bool] = True
    whole_block: ClassVar[frozenset[str]] = frozenset({"allocation", "outlier_times", "within"})

    sparsity: float | None = Field(None, ge=0, lt=1, description="fraction of the weights that become zero (0.5)")
    pattern: str = Field("unstructured", description="unstructured, or N:M: N zeros in every M consecutive inputs")
    allocation: Allocation = Field(
        "uniform",
        description="uniform; outliers: blocks with more outliers are less sparse (OWL); loss: least rise of the loss",
    )
    outlier_times: float | None = Field(
        None,
        gt=1,
        description="allocation: outliers; a score above this multiple of the block's mean is an outlier (5)",
    )
    within: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="allocation: outliers or loss; largest deviation of any sparsity from the mean (0.08)",
    )

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, name: str) -> str:
        found = named_pattern(name)
        return found.name if found else name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        shape = named_pattern(self.pattern)
        if shape and self.sparsity not in (None, shape.share):
            raise ValueError(f"pattern {shape.name} fixes `sparsity` at {shape.share:g}: remove it, or write null")
        if shape and self.allocation != "uniform":
            raise ValueError(f"pattern {shape.name} fixes the sparsity everywhere: `allocation` must be uniform")
        if self.outlier_times is not None and self.allocation != "outliers":
            raise ValueError("`outlier_times` applies to `allocation: outliers` only")
        if self.within is not None and self.allocation == "uniform":
            raise ValueError("`within` applies to `allocation: outliers` and `loss` only")
        return self

    @property
    def zeros(self) -> Pattern | None:
        """The pattern; None for unstructured."""
        return named_pattern(self.pattern)

    @property
    def target(self) -> float:
        """The sparsity of the pattern, or `sparsity`."""
        shape = self.zeros
        if shape:
            return shape.share
        return 0.5 if self.sparsity is None else self.sparsity

    def traits(self) -> frozenset[Trait]:
        """Zeros, and whether they follow a pattern."""
        return self.leaves | {"pattern"} if self.zeros else self.leaves

    def uses_data(self) -> bool:
        """What is measured, or what the allocation must know."""
        return bool(self.needs()) or self.allocation != "uniform"

    def check(self, model_map: ModelMap) -> None:
        """Check that every selected site divides into groups of its pattern.

        Raises: CompressError listing all that do not.
        """
        self._check_widths(
            (block.full(site.name), site.inputs)
            for block in model_map.blocks
            for site in block.structure.sites
            if self.selects(block.full(site.name))
        )

    def streams(self) -> bool:
        """Gradients of the loss are those of the whole model."""
        return self.allocation != "loss"

    def forwards(self) -> int:
        """One more stream if the sparsity is allocated."""
        return super().forwards() + 2 * (self.allocation != "uniform")

    def backward(self) -> Backward | None:
        """For allocation by loss."""
        return Backward(recomputes=True) if self.allocation == "loss" else None

    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """The sparsity of each site, if it is allocated."""
        return {} if self.allocation == "uniform" else decide_shares(self, whole)

    @override
    def with_decisions(self, decisions: Mapping[str, Tensor]) -> Self:
        of_site = {site: {"sparsity": min(float(share), _ALMOST_ALL)} for site, share in decisions.items()}
        return self.with_site_options({"allocation": "uniform", "outlier_times": None, "within": None}, of_site)

    @override
    def plain(self) -> Sequence[BlockPass]:
        """The smallest weights of every site, in the same shares and pattern."""
        return (with_options_of(self, "magnitude", ("sparsity", "pattern")),)

    def chosen(self, block: BlockWork, sites: Sequence[LinearSite]) -> Iterator[tuple[Self, LinearSite, float]]:
        """Every site with its options and its sparsity."""
        self._check_widths((site.name, site.info.inputs) for site in sites)
        for site in sites:
            here = self.for_site(site.name)
            share = block.decisions.get(site.name)
            yield here, site, here.target if share is None else float(share)

    @abstractmethod
    def mask(self, weight_OI: Tensor, squares_I: Tensor, share: float) -> Tensor:
        """True where a weight is dropped; `squares_I` are sums of squared inputs."""

    def has_own_share(self, site: str) -> bool:
        """Whether an override fixes the site's sparsity, so that no allocation moves it."""
        here = self.for_site(site)
        return here.zeros is not None or here.target != self.target

    def _check_widths(self, widths: Iterable[tuple[str, int]]) -> None:
        wrong = []
        for name, inputs in widths:
            shape = self.for_site(name).zeros
            if shape and inputs % shape.of:
                wrong.append((name, inputs, shape))
        if wrong:
            raise _indivisible(wrong)


def lowest_scores(score_OI: Tensor, share: float, pattern: Pattern | None, *, by_row: bool = False) -> Tensor:
    """The lowest scores of every group of the pattern; without one of every output's row, or of the site."""
    if pattern:
        return lowest_per_group(score_OI, pattern)
    return lowest_per_row(score_OI, share) if by_row else lowest(score_OI, count_of_zeros(share, score_OI.numel()))


def magnitude_mask(weight_OI: Tensor, share: float, pattern: Pattern | None, *, by_row: bool = False) -> Tensor:
    """The smallest weights of a site: the baseline of every other mask."""
    return lowest_scores(zeros_first(weight_OI.abs(), weight_OI), share, pattern, by_row=by_row)


def sparsity(weight_OI: Tensor) -> float:
    """Share of weights that are exactly zero."""
    return int((weight_OI == 0).sum()) / weight_OI.numel()


def _indivisible(wrong: Sequence[tuple[str, int, Pattern]]) -> CompressError:
    """One error for all sites, with every way out."""
    kinds = dict.fromkeys(f"{re.sub(_NUMBER, '*', name)}: {inputs} inputs, {each.name}" for name, inputs, each in wrong)
    leaves = sorted({f'"*.{name.rpartition(".")[2]}"' for name, _, _ in wrong})
    shape = wrong[0][2]
    common = gcd(*(inputs for _, inputs, _ in wrong))
    step = shape.of // gcd(shape.zeros, shape.of)
    fitting = [of for of in range(step, shape.of, step) if common % of == 0]
    fixes = [f"`pattern: {round(max(fitting) * shape.share)}:{max(fitting)}`"] if fitting else []
    fixes += [
        f"exclude these sites with `exclude: [{', '.join(leaves)}]`",
        f"use the same sparsity without a pattern: `overrides: {{{leaves[0]}: {{pattern: unstructured, "
        f"sparsity: {shape.share:g}}}}}`",
    ]
    return CompressError(
        "sparsity.indivisible",
        f"{'1 site has inputs' if len(wrong) == 1 else f'{len(wrong)} sites have inputs'} "
        "that do not divide into groups of the pattern",
        where="; ".join(kinds),
        fix="use " * bool(fitting) + ", or ".join(fixes),
        exit_code=ExitCode.USAGE,
    )
