"""Layer skipping: tokens skip the blocks that would hardly change them. N = calibration tokens, D = hidden size."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.readout import watching
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.dynamic_skip import SkipBlock
from llmcompress.modules.linear_predictor import LinearPredictor
from llmcompress.passes.base import PASSES, ModelPass, Trait
from llmcompress.passes.dynamic.fit_predictor import PredictorFit
from llmcompress.passes.dynamic.states import measured, put_around
from llmcompress.records.rows import SiteReport


@PASSES.register("layer_skip")
class LayerSkip(ModelPass):
    """A linear predictor before each block estimates its influence on the token, 1 - cos(input, output); tokens below
    the threshold skip the block.

    The predictors are ridge regressions of the logarithm of the influence on calibration text. One threshold for all
    blocks is chosen so that the fraction `skip` of all (token, block) pairs is skipped; blocks that no calibration
    token would skip are not changed. A skipped block still stores the token's keys and values, so that later tokens can
    attend to it and cached decoding computes the same as one forward pass over the text.

    Source: influence from Men et al. (ShortGPT), arXiv 2403.03853; a router per block from Raposo et al.
    (Mixture-of-Depths), arXiv 2404.02258. Differs: nothing is trained, and the number of tokens is not fixed.
    Saves time where all tokens of a forward pass skip: when decoding one sequence. A batch gains only where all its
    sequences skip.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"dynamic"})
    keeps_codes: ClassVar[bool] = True

    skip: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="fraction of (token, block) pairs to skip, on the calibration text; 0.1 by default",
    )
    threshold: float | None = Field(
        None, ge=0, description="predicted influence below which a token skips a block; 0: never"
    )
    ridge: float = Field(0.01, gt=0, description="ridge of the predictors, as a fraction of the mean square")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.skip is not None and self.threshold is not None:
            raise ValueError("give one of `skip` and `threshold`")
        return self

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def conflict_with(self, trait: Trait) -> str | None:
        return None

    @override
    @torch.no_grad()
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Fit the predictors, choose the threshold, wrap the blocks that tokens skip."""
        with whole.resident() as model:
            blocks = find_blocks(model)
            predictors = [
                predictor.to(whole.context.device) for predictor in self._predictors(whole, model, len(blocks))
            ]
            predicted_LN = self._predictions(whole, model, predictors)
            threshold = self.threshold
            if threshold is None:
                threshold = threshold_for(predicted_LN, 0.1 if self.skip is None else self.skip)
            used = {
                index: SkipBlock(predictor, threshold)
                for index, predictor in enumerate(predictors)
                if bool((predicted_LN[index] < threshold).any())
            }
            put_around(model, used)
            return measured(whole, model, [blocks[index][0] for index in used], "layer_skip", threshold)

    def _predictors(self, whole: WholeModel, model: PreTrainedModel, blocks: int) -> list[LinearPredictor]:
        """One predictor per block."""
        fits = [PredictorFit(whole.map.hidden_size, whole.context.device) for _ in range(blocks)]
        before = torch.empty(0)

        def see(index: int, state_ND: Tensor) -> None:
            nonlocal before
            if index:
                fits[index - 1].add(before, 1 - functional.cosine_similarity(before, state_ND, dim=1))
            before = state_ND

        with watching(model, see):
            for ids_BT in whole.batches():
                model.base_model(input_ids=ids_BT, use_cache=False)
        return [fit.solve(self.ridge, whole.context.storage_dtype) for fit in fits]

    def _predictions(self, whole: WholeModel, model: PreTrainedModel, predictors: list[LinearPredictor]) -> Tensor:
        """Predictions for every token, blocks × N."""
        predicted: list[list[Tensor]] = [[] for _ in predictors]

        def see(index: int, state_ND: Tensor) -> None:
            if index < len(predictors):
                predicted[index].append(predictors[index](state_ND).cpu())

        with watching(model, see):
            for ids_BT in whole.batches():
                model.base_model(input_ids=ids_BT, use_cache=False)
        return torch.stack([torch.cat(each) for each in predicted])


def threshold_for(predicted_LN: Tensor, skip: float) -> float:
    """The threshold below which the share `skip` of all values lies, or as few more or less as ties allow."""
    ordered = predicted_LN.flatten().sort().values
    return float(ordered[min(round(skip * len(ordered)), len(ordered) - 1)]) if skip else 0.0
