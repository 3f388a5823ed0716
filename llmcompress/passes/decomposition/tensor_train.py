"""A linear as a tensor train. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.tensor_train import TensorTrainLinear
from llmcompress.numerics.statistics import Statistic
from llmcompress.numerics.tensor_train import (
    decompose,
    decompose_within,
    matrix_axes,
    matrix_to_tensor,
    ranks_within,
)
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.records.rows import SiteReport

_MULTIPLIED_OUT: Mapping[Trait, str] = {
    "zeros": "would replace zeros by the product of dense cores",
    "pattern": "would replace zeros by the product of dense cores",
    "factors": "would factor low-rank factors again",
}


@PASSES.register("tensor_train")
class TensorTrain(BlockPass):
    """Reshape both sides of a matrix into several axes and decompose it into a tensor train, a chain of small cores.

    Uses the weights only, no data. At equal parameters `svd` loses far less on every model measured (docs/results.md).
    `score` in the report is the squared error of the weight ÷ its squared norm. Cores are not linears: later passes do
    not see them.

    Source: Novikov et al., arXiv 1509.06569; Oseledets, SIAM J. Sci. Comput. 33 (2011).
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"factors"})
    conflicts: ClassVar[Mapping[Trait, str]] = _MULTIPLIED_OUT
    changes_sites: ClassVar[bool] = True

    fraction: float | None = Field(
        None, gt=0, lt=1, description="fraction of the parameters to remove (0.2 if no eps is given)"
    )
    eps: float | None = Field(None, ge=0, lt=1, description="instead of `fraction`: ‖error‖ ≤ eps · ‖weight‖")
    ways: int = Field(
        2, ge=2, le=8, description="number of axes per side of the matrix, as even as its prime factors allow"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.fraction is not None and self.eps is not None:
            raise ValueError("give `fraction` or `eps`, not both (set the other to null)")
        return self

    @override
    def names_after(self, site: str) -> tuple[str, ...]:
        """None: cores are no linears."""
        return ()

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """The fraction, if there is one: what `eps` leaves is not known before."""
        return 1 - (0.2 if self.fraction is None and self.eps is None else self.fraction or 0.0)

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing."""
        return ()

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Decompose every site separately."""
        rows = []
        for site in sites:
            block.context.progress.substep(f"tensor_train {site.info.name}")
            rows.append(self.for_site(site.name)._replace(site))
        return rows

    def _replace(self, site: LinearSite) -> SiteReport:
        weight_OI = site.weight_OI
        outputs, inputs = matrix_axes(site.info.outputs, site.info.inputs, self.ways)
        cores = self._cores(matrix_to_tensor(weight_OI, outputs, inputs), outputs, inputs)
        bonds = (1, *(core.shape[3] for core in cores))
        shapes = zip(bonds[:-1], outputs, inputs, bonds[1:], strict=True)
        train = TensorTrainLinear([core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)], site.bias_O)
        parameters = sum(core.numel() for core in cores)
        row = SiteReport(site=site.name, algorithm="tensor_train", parameters=weight_OI.numel())
        if parameters >= weight_OI.numel():
            why = f"kept dense: cores of ranks {train.ranks} would not be smaller"
            return row.model_copy(update={"degraded": why})
        lost = (train.dense_weight() - weight_OI).double().square().sum() / weight_OI.double().square().sum()
        site.replace(train)
        update = {"parameters": parameters, "rank": max(train.ranks), "score": float(lost.nan_to_num())}
        return row.model_copy(update=update)

    def _cores(self, tensor_D: Tensor, outputs: Sequence[int], inputs: Sequence[int]) -> list[Tensor]:
        axes = [m * n for m, n in zip(outputs, inputs, strict=True)]
        if self.eps is not None:
            return decompose_within(tensor_D[None], axes, self.eps)
        keep = 1 - (0.2 if self.fraction is None else self.fraction)
        return decompose(tensor_D[None], axes, ranks_within(tensor_D, axes, int(keep * len(tensor_D))))
