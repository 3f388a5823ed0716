"""TensorGPT: every row of the embedding as a tensor train. V = entries, D = width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.embedding_multiplier import embedding_multiplier
from llmcompress.model.map import ModelMap
from llmcompress.model.rotation import untie
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.tensor_train import TensorTrainEmbedding, TensorTrainHead
from llmcompress.numerics.tensor_train import (
    balanced_factors,
    compose,
    decompose,
    decompose_within,
    full_ranks,
    train_parameters,
)
from llmcompress.passes.base import PASSES, ModelPass, Trait
from llmcompress.records.rows import SiteReport


@PASSES.register("tensorgpt")
class TensorGPT(ModelPass):
    """Reshape each token's embedding vector into a tensor and decompose it into a tensor train; no data, no training.

    A tied output head cannot stay tied: untied and dense it makes the model larger, and the report says by how much.
    `score` in the report is the squared error of the embedding ÷ its squared norm.

    Source: Xu et al., arXiv 2307.00526. Differs: two axes by default, which lose less than more axes at equal
    parameters on the models measured (docs/results.md).
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"tables"})
    conflicts: ClassVar[Mapping[Trait, str]] = {"tables": "needs an ordinary embedding"}

    fraction: float | None = Field(
        None, gt=0, lt=1, description="fraction of the embedding's parameters to remove (default 0.2)"
    )
    rank: int | None = Field(None, ge=1, description="instead of `fraction`: the rank of every bond")
    eps: float | None = Field(None, ge=0, lt=1, description="instead of `fraction`: ‖error‖ ≤ eps · ‖embedding‖")
    ways: int = Field(2, ge=2, le=12, description="number of axes per vector, as even as its prime factors allow")
    head: Literal["copy", "keep", "share"] = Field(
        "copy",
        description="if the output head is tied. copy: untie it as a dense matrix, even if the model grows; keep: "
        "refuse if the model would grow; share: the same tensor trains, stored twice, if smaller",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if sum(value is not None for value in (self.fraction, self.rank, self.eps)) > 1:
            raise ValueError("give one of `fraction`, `rank` and `eps` (set the others to null)")
        return self

    @override
    def selects(self, site: str) -> bool:
        """No linear of a block."""
        return False

    @override
    def uses_data(self) -> bool:
        return False

    @override
    def check(self, model_map: ModelMap) -> None:
        if model_map.tied and self.head == "keep":
            raise CompressError(
                "tensorgpt.larger",
                "the output head is tied to the embedding, and untying it would make the model larger",
                where="head: keep",
                fix="set `head: share` to use the same tensor trains, or `head: copy` to accept the larger model",
                exit_code=ExitCode.USAGE,
            )

    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Replace the embedding, and a tied head as the options say."""
        model = whole.model
        embedding = model.get_input_embeddings()
        if isinstance(embedding, CompressedModule) or not isinstance(embedding, nn.Embedding):
            raise CompressError(
                "tensorgpt.no-embedding",
                f"the embedding is a {type(embedding).__name__}, not a plain table",
                where=whole.map.embedding,
                fix="put this pass first in the recipe, and only once",
            )
        table_VD, tied = embedding.weight.detach().float(), whole.map.tied
        cores = self._cores(table_VD)
        stored = sum(core.numel() for core in cores) * (2 if tied and self.head == "share" else 1)
        if stored >= table_VD.numel():
            twice = ", twice for a tied head," if tied and self.head == "share" else ""
            why = f"kept dense: its tensor trains{twice} would not be smaller"
            return [_row(whole.map.embedding, embedding, degraded=why)]
        lost = float((compose(cores) - table_VD).double().square().sum() / table_VD.double().square().sum())
        cores = [core.to(embedding.weight.dtype) for core in cores]
        train = TensorTrainEmbedding(cores, embedding_multiplier(model, embedding))
        head = model.get_output_embeddings()
        if tied:
            untie(model)
        model.set_input_embeddings(train.train(embedding.training))
        rows = [_row(whole.map.embedding, train, rank=max(train.ranks), score=lost)]
        if tied and self.head == "share":
            bias = getattr(head, "bias", None)
            shared = TensorTrainHead([core.clone() for core in cores], None if bias is None else bias.detach())
            model.set_output_embeddings(shared.train(head.training))
            rows.append(_row(whole.map.head, shared, rank=max(train.ranks), score=lost))
        elif tied:
            why = f"untied: the dense output head adds {stored} parameters to the model"
            rows.append(_row(whole.map.head, head, degraded=why))
        return rows

    def _cores(self, table_VD: Tensor) -> list[Tensor]:
        axes = balanced_factors(table_VD.shape[1], self.ways)
        if self.eps is not None:
            return decompose_within(table_VD, axes, self.eps)
        return decompose(table_VD, axes, self._ranks(axes, table_VD.shape[1]))

    def _ranks(self, axes: tuple[int, ...], width: int) -> tuple[int, ...]:
        """All bonds alike, as far as they go."""
        full = full_ranks(axes)
        if self.rank is not None:
            return tuple(min(self.rank, most) for most in full)
        keep = 1 - (0.2 if self.fraction is None else self.fraction)
        fitting = [tuple(min(rank, most) for most in full) for rank in range(1, max(full) + 1)]
        small = [ranks for ranks in fitting if train_parameters(axes, ranks) <= keep * width]
        return small[-1] if small else fitting[0]


def _row(name: str, module: nn.Module, **facts: float | str | None) -> SiteReport:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return SiteReport(site=name, algorithm="tensorgpt", parameters=parameters, **facts)  # type: ignore[arg-type]
