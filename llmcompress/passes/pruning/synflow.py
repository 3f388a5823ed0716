"""SynFlow: prunes in many small rounds by synaptic flow, without data; no layer ever becomes empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.schedule import exponential_shares
from llmcompress.numerics.synflow import synflow_scores
from llmcompress.passes.base import PASSES
from llmcompress.passes.pruning.at_init import AtInitPass
from llmcompress.passes.pruning.flow_graph import flow_stages


@PASSES.register("synflow")
class SynFlow(AtInitPass):
    """Zero the weights with the least synaptic flow, rescored after each of many rounds.

    Source: Tanaka et al., arXiv 2006.05467. Differs: the flow through a decoder, see `numerics/synflow.py`; embedding
    and output head are never pruned, so the flow starts and ends with ones in the residual stream.
    """

    whole_block: ClassVar[frozenset[str]] = AtInitPass.whole_block | {"rounds"}

    rounds: int = Field(100, ge=1, description="pruning rounds; the kept fraction decays exponentially")

    @override
    def uses_data(self) -> bool:
        return False

    @override
    def masks(self, whole: WholeModel, sites: Sequence[LinearSite]) -> list[Tensor]:
        blocks = [flow_stages(info.structure) for info in whole.map.blocks]
        weights = {site.name: site.weight_OI.double() for site in whole.sites()}
        by_block = [
            {site.name: weights[info.full(site.name)] for site in info.structure.sites} for info in whole.map.blocks
        ]
        masks = [weights[site.name] == 0 for site in sites]
        for index, share in enumerate(exponential_shares(self.sparsity, self.rounds)):
            whole.context.progress.substep("synflow", done=index, total=self.rounds)
            scores = {
                info.full(name): score
                for info, found in zip(
                    whole.map.blocks, synflow_scores(whole.map.hidden_size, blocks, by_block), strict=True
                )
                for name, score in found.items()
            }
            # logarithms: the scores of deep models do not fit float32
            logs = [scores[site.name].log().float() for site in sites]
            masks = self.drop(logs, masks, share)
            for site, mask_OI in zip(sites, masks, strict=True):
                weights[site.name].masked_fill_(mask_OI, 0)
        return masks
