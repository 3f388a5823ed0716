"""What quantizers share that start from another quantizer's codes and train them against the dense model's outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence

from pydantic import Field, field_validator

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import DESCRIPTION, named_scheme
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.nested_quantizer import AroundQuantizer
from llmcompress.passes.quantization.block_training import LeastError
from llmcompress.records.rows import SiteReport

FIRST_CODES = frozenset({"quantizer", "steps", "windows"})
"""Options of a block as a whole."""


class LearnedCodes(AroundQuantizer):
    """Another quantizer finds the first codes of a block; then `learned` trains them on an integer grid."""

    steps: int = Field(64, ge=1, description="optimization steps per block")
    windows: int = Field(1, ge=1, description="windows per step")

    @field_validator("scheme")
    @classmethod
    def _integers(cls, name: str) -> str:
        scheme = named_scheme(name)
        if scheme.weights.number is not None:
            raise ValueError(f"codes are learned on integer grids, and {name} is none: {DESCRIPTION}")
        return scheme.name

    def needs(self) -> tuple[type[Statistic], ...]:
        """What the quantizer reads."""
        return self.inner.needs()

    def uses_data(self) -> bool:
        """Both streams do, whatever the quantizer reads."""
        return True

    def wants_dense(self) -> bool:
        """What the block is to give."""
        return True

    def pools(self) -> bool:
        """As the quantizer: gradients add up."""
        return self.inner.pools()

    def trained_windows(self) -> int:
        """Every step looks at some."""
        return self.steps * self.windows

    def run(self, block: BlockWork) -> list[SiteReport]:
        """Quantize as the quantizer does, then learn."""
        sites = [site for site in block.sites if self.selects(site.name)]
        return self.learned(block, sites, lambda: self.inner.run(block))

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """The same on sites that are measured already."""
        return self.learned(block, sites, lambda: self.inner.apply(block, sites))

    @abstractmethod
    def learned(
        self, block: BlockWork, sites: Sequence[LinearSite], quantize: Callable[[], list[SiteReport]]
    ) -> list[SiteReport]:
        """Quantize, which gives rows; learn; the rows with the block's errors."""


def with_errors(
    rows: Sequence[SiteReport], title: str, learned: Collection[LinearSite], least: LeastError
) -> list[SiteReport]:
    """Rows of sites that were learned say so, with the block's error at the first codes and at the best step."""
    names = {site.name for site in learned}
    told = {"error": least.error, "error_before": least.first}
    return [
        row.model_copy(update={"algorithm": f"{title}, {row.algorithm}", **told}) if row.site in names else row
        for row in rows
    ]
