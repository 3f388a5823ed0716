"""Tucker decomposition of attention linears, with factors shared by the heads: (heads, rows of a head, inputs)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import BlockInfo, ModelMap, WidthPart
from llmcompress.model.site import LinearSite
from llmcompress.model.units import groups_of
from llmcompress.modules.tucker import TuckerLinear
from llmcompress.numerics.statistics import Statistic
from llmcompress.numerics.tucker import higher_order_iteration, tucker_parameters, tucker_ranks
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.records.rows import SiteReport


@PASSES.register("tucker")
class TuckerHeads(BlockPass):
    """Tucker decomposition of attention linears: one factor for the rows of all heads, one for the inputs, one across
    heads, and a core.

    Works on linears whose rows or columns are contiguous heads (heads that share keys count as one); others are not
    changed. Uses the weights only, no data. `score` in the report is the squared error of the weight ÷ its squared
    norm.

    Source: De Lathauwer et al., SIAM J. Matrix Anal. 21 (2000): higher-order SVD, improved by HOOI.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"factors"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would replace zeros by the product of dense factors",
        "pattern": "would replace zeros by the product of dense factors",
        "factors": "would factor low-rank factors again",
    }
    changes_sites: ClassVar[bool] = True

    fraction: float = Field(
        0.2, gt=0, lt=1, description="fraction of the parameters to remove from each site that has heads"
    )

    @override
    def names_after(self, site: str) -> tuple[str, ...]:
        """The site where it has no heads; factors are no linears."""
        return (site,)

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing."""
        return ()

    @override
    def check(self, model_map: ModelMap) -> None:
        if not any(self.selects(info.full(part.site)) for info in model_map.blocks for part in _parts(info)):
            raise CompressError(
                "tucker.no-heads",
                "no selected site consists of several heads",
                fix="select the linears of an attention with several key-value heads; `llmcompress inspect` lists them",
                exit_code=ExitCode.USAGE,
            )

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Decompose every site that has heads separately."""
        selected = {site.info.name: site for site in sites}
        rows = []
        for part in _parts(block.info):
            if part.site in selected:
                block.context.progress.substep(f"tucker {part.site}")
                rows.append(self.for_site(selected[part.site].name)._replace(selected[part.site], part))
        return rows

    def _replace(self, site: LinearSite, part: WidthPart) -> SiteReport:
        weight_OI = site.weight_OI
        row = SiteReport(site=site.name, algorithm="tucker", parameters=weight_OI.numel())
        inside_XA = weight_OI if part.axis == "rows" else weight_OI.T
        if [index for unit in part.indices for index in unit] != list(range(len(inside_XA))):
            return row.model_copy(update={"degraded": "kept dense: its heads are not contiguous"})
        tensor_HRI = inside_XA.reshape(len(part.indices), -1, inside_XA.shape[1])
        ranks = tucker_ranks(tensor_HRI, int((1 - self.fraction) * weight_OI.numel()))
        if ranks is None:
            return row.model_copy(update={"degraded": "kept dense: even rank one is too large"})
        found = higher_order_iteration(tensor_HRI, ranks)
        core, heads, inside, across = (tensor.to(weight_OI).contiguous() for tensor in (found.core_abc, *found.factors))
        site.replace(TuckerLinear(core, heads, inside, across, site.bias_O, split=part.axis))
        whole = float(weight_OI.double().square().sum())
        lost = whole - float(found.core_abc.square().sum())
        return row.model_copy(
            update={
                "parameters": tucker_parameters(tensor_HRI.shape, ranks),
                "rank": ranks[2],
                "score": max(lost, 0.0) / whole if whole else 0.0,
            }
        )


def _parts(info: BlockInfo) -> Iterator[WidthPart]:
    """The rows or columns of every linear that are heads."""
    for group in groups_of(info):
        if group.kind == "heads":
            yield from group.parts
