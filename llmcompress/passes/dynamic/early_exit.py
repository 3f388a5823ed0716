"""Early exit: tokens with a confident prediction skip the remaining blocks.

N = calibration tokens, D = hidden size, E = exits, C = candidate thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.readout import readout_of
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.dynamic_exit import ExitBlock, readings
from llmcompress.numerics.linear_map import LinearMap
from llmcompress.passes.base import PASSES, ModelPass, Trait
from llmcompress.passes.dynamic.fit_predictor import PredictorFit
from llmcompress.passes.dynamic.states import divergence, measured, put_around, states_at
from llmcompress.records.rows import SiteReport

NEVER = 2.0
"""No probability reaches it."""
CANDIDATES = 256
AGREEMENT = 0.95


@PASSES.register("early_exit")
class EarlyExit(ModelPass):
    """A token exits before block e when its confidence there reaches `threshold`.

    `confidence: divergence` predicts, with a linear model, how many nats this early prediction would differ from the
    full model's (the confidence is exp of its negative); `probability` takes the largest probability that the output
    head gives there. Skipped blocks still store the token's keys and values, computed from its exit state, so that
    later tokens can attend to it and cached decoding computes the same as one forward pass over the text. With `jump`,
    a linear map fitted on the calibration text carries the exit state to the output of the last block.

    All exits share one threshold, chosen on the calibration text: the lowest one that keeps the fraction `agreement` of
    the predictions, or the one that runs the mean fraction `depth` of the blocks; or it is given.

    Source: Schuster et al. (CALM), arXiv 2207.07061, softmax response and state copying; Din et al., arXiv 2303.09435,
    the linear jump. Differs: nothing is trained; the predicted divergence is our own (compared with the probability in
    evals/dynamic.py).
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"dynamic"})
    keeps_codes: ClassVar[bool] = True

    exits: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="blocks before which a token may exit, from 0; null: at 1/2 and 3/4 of the depth",
    )
    threshold: float | None = Field(None, gt=0, description="probability at which a token exits; above 1: never")
    agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"fraction of predictions on the calibration text that must not change; {AGREEMENT} by default",
    )
    depth: float | None = Field(None, gt=0, le=1, description="mean fraction of blocks to run, on the calibration text")
    confidence: Literal["divergence", "probability"] = Field(
        "divergence",
        description="divergence: a linear predictor estimates how far the prediction is from the full model's; "
        "probability: the largest one of the output head, which costs one head product per exit",
    )
    jump: bool = Field(
        True, description="map exiting states to the last block's output by a linear map, stored with the exit"
    )
    ridge: float = Field(0.01, gt=0, description="ridge of the fitted maps, as a fraction of the mean square")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if sum(rule is not None for rule in (self.threshold, self.agreement, self.depth)) > 1:
            raise ValueError("give one of `threshold`, `agreement` and `depth`")
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
        """Fit the jumps, choose the threshold, put the blocks from the first exit on into exit blocks.

        Raises: CompressError when there is no block behind an exit, or the readout cannot be repeated.
        """
        with whole.resident() as model:
            blocks = find_blocks(model)
            exits = self._exits(len(blocks))
            readout = readout_of(model, next(whole.batches())[:1])
            read = [model.get_submodule(name) for name in readout]
            jumps = self._jumps(whole, model, exits)
            trials = {index: ExitBlock(NEVER, readout, jumps.get(index)).to(whole.context.device) for index in exits}
            if self.confidence == "divergence":
                self._judge(whole, model, trials, read)
            outcomes = _outcomes(whole, model, trials, read)
            threshold = self._threshold(*outcomes, torch.tensor(exits) / len(blocks))
            for trial in trials.values():
                trial.threshold = threshold
            rest = {index: ExitBlock(None, readout, None) for index in range(min(exits), len(blocks))}
            put_around(model, rest | trials)
            return measured(whole, model, [blocks[index][0] for index in rest], "early_exit", threshold)

    def _exits(self, blocks: int) -> tuple[int, ...]:
        chosen = self.exits or (blocks // 2, 3 * blocks // 4)
        exits = tuple(sorted({index for index in chosen if self.exits or index}))
        wrong = [index for index in exits if not 0 < index < blocks]
        if wrong or not exits:
            raise CompressError(
                "dynamic.exits",
                f"there is no exit before block {wrong[0]}" if wrong else "a model with one block cannot exit early",
                where=f"early_exit.exits of {blocks} blocks",
                fix=f"use numbers from 1 to {blocks - 1}",
                exit_code=ExitCode.USAGE,
            )
        return exits

    def _jumps(
        self, whole: WholeModel, model: PreTrainedModel, exits: tuple[int, ...]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Matrix and shift of every exit, rounded as they will be stored."""
        if not self.jump:
            return {}
        width = whole.map.hidden_size
        maps = {index: LinearMap(width, width, whole.context.device) for index in exits}
        end = len(whole.map.blocks)
        for states in states_at(whole, model, {*exits, end}):
            for index, fitted in maps.items():
                fitted.add(states[index], states[end])
        start_ID = torch.eye(width + 1, device=whole.context.device)[:, :width]
        found = {}
        for index, fitted in maps.items():
            map_ID = fitted.solve(start_ID, self.ridge).to(whole.context.storage_dtype).float()
            found[index] = map_ID[:-1].T.contiguous(), map_ID[-1].clone()
        return found

    def _judge(
        self, whole: WholeModel, model: PreTrainedModel, trials: Mapping[int, ExitBlock], read: Sequence[nn.Module]
    ) -> None:
        """Give every exit the predictor of how far its predictions are from the full model's."""
        end = len(whole.map.blocks)
        fits = {index: PredictorFit(whole.map.hidden_size, whole.context.device) for index in trials}
        for states in states_at(whole, model, {*trials, end}):
            for index, fit in fits.items():
                fit.add(states[index], divergence(read, states[end], trials[index].jump(states[index])))
        for index, trial in trials.items():
            trial.predictor = fits[index].solve(self.ridge, whole.context.storage_dtype).to(whole.context.device)

    def _threshold(self, sure_NE: Tensor, agrees_NE: Tensor, depths_E: Tensor) -> float:
        if self.threshold is not None:
            return self.threshold
        quantiles_C = torch.linspace(0, 1, CANDIDATES, dtype=torch.float64)
        ranks_C = (quantiles_C * (sure_NE.numel() - 1)).round().long()
        falling_C = sure_NE.double().flatten().sort().values[ranks_C].flip(0)
        ladder: list[float] = [NEVER, *falling_C.tolist()]
        at = [outcome_at(each, sure_NE, agrees_NE, depths_E) for each in ladder]
        if self.depth is not None:
            distances = [abs(depth - self.depth) for depth, _ in at]
            return ladder[distances.index(min(distances))]
        wanted = AGREEMENT if self.agreement is None else self.agreement
        short = [agreement < wanted for _, agreement in at]
        return ladder[(short.index(True) if True in short else len(ladder)) - 1]


def _outcomes(
    whole: WholeModel, model: PreTrainedModel, trials: Mapping[int, ExitBlock], read: Sequence[nn.Module]
) -> tuple[Tensor, Tensor]:
    """N×E: how sure each token is at each exit, and whether it would predict what the whole model predicts."""
    end = len(whole.map.blocks)
    sure, agrees = [], []
    for states in states_at(whole, model, {*trials, end}):
        final_N = readings(read, states[end])[1]
        here = [(readings(read, trial.jump(states[index])), trial, states[index]) for index, trial in trials.items()]
        judged = [(-trial.predictor(state)).exp() if trial.predictor else most for (most, _), trial, state in here]
        sure.append(torch.stack(judged, 1).cpu())
        agrees.append(torch.stack([tokens == final_N for (_, tokens), _, _ in here], 1).cpu())
    return torch.cat(sure), torch.cat(agrees)


def outcome_at(threshold: float, sure_NE: Tensor, agrees_NE: Tensor, depths_E: Tensor) -> tuple[float, float]:
    """Mean depth and agreement when every token leaves at its first exit where it is as sure as `threshold`.

    `depths_E` is the fraction of blocks run at each exit. Assumes that all earlier tokens ran every block.
    """
    leaves_NE = sure_NE >= threshold
    first_N = leaves_NE.int().argmax(1)
    leaves_N = leaves_NE.any(1)
    depth_N = torch.where(leaves_N, depths_E[first_N], torch.ones(()))
    agrees_N = agrees_NE.gather(1, first_N[:, None])[:, 0] | ~leaves_N
    return float(depth_N.double().mean()), float(agrees_N.double().mean())
