"""Deep-to-shallow self-distillation: what an early exit would predict is taught by the model's own last layer.

R = rows (positions of all samples), D = hidden size, V = vocabulary, E = exits.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.readout import readout_of
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.dynamic_exit import logits_of
from llmcompress.training.data.batch import IGNORED
from llmcompress.training.features import Wanted
from llmcompress.training.objectives.base import OBJECTIVES, Objective, ObjectiveInputs
from llmcompress.training.objectives.features import at_least_float32
from llmcompress.training.objectives.kl import kl_terms
from llmcompress.training.targets import TeacherRows
from llmcompress.training.teacher import Teacher

_PROBED = 16
"""Tokens on which the readout is found."""


@OBJECTIVES.register("exits")
class Exits(BaseModel, Objective):
    """weight · KL(last layer ‖ exit) + (1 - weight) · cross-entropy of the exit, mean over exits.

    An exit predicts with the final norm and the output head, as in the pass `early_exit`, which this prepares for. The
    last layer is only taught by what stands beside this objective, e.g. `{exits: {}, cross_entropy: {}}`; no other
    teacher is needed.

    Source: Zhang et al., arXiv 1905.08094, equations 4 and 5 (BYOT). Differs: exits share the output head instead of
    having their own; hidden states are not compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    exits: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Blocks before which a token may exit, from 1; None: at 1/2 and 3/4 of the depth, as `early_exit` does."""
    factor: float = Field(default=1.0, gt=0)
    """What the loss is multiplied by, where it is added to others."""
    weight: float = Field(default=1.0, ge=0, le=1)
    """Weight of the divergence from the last layer; the rest is cross-entropy with the text."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions; the divergence is multiplied by its square."""

    _readout: list[nn.Module] = PrivateAttr(default_factory=list)
    _exits: list[int] = PrivateAttr(default_factory=list)

    @override
    def observes(self) -> Wanted:
        return Wanted(hidden=True)

    @override
    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        """Raises: CompressError for a block that there is not, or where logits cannot be read off in between."""
        blocks, vocabulary = len(find_blocks(student)), student.config.get_text_config().vocab_size
        self._exits[:] = sorted({max(1, blocks // 2), max(1, 3 * blocks // 4)}) if self.exits is None else self.exits
        wrong = [each for each in self._exits if not 1 <= each < blocks]
        if wrong:
            raise CompressError(
                "training.exits",
                f"no token can exit before block {wrong[0]}: the model has blocks 0 to {blocks - 1}",
                where="exits",
                fix=f"use 1 to {blocks - 1}",
                exit_code=ExitCode.USAGE,
            )
        ids_BT = torch.arange(min(vocabulary, _PROBED), device=student.device)[None]
        self._readout[:] = [student.get_submodule(name) for name in readout_of(student, ids_BT)]
        return []

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        assert inputs.features is not None, "the training loop sees to them"
        states = [inputs.features.hidden[index - 1].flatten(0, 1) for index in self._exits]
        return self.factor * inputs.mean_over_tokens(self._per_token, *states)

    def _per_token(
        self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None, *states_RD: Tensor
    ) -> Tensor:
        deepest_RV = functional.log_softmax(student_RV.detach() / self.temperature, -1)
        each = [self._one(deepest_RV, targets_R, logits_of(self._readout, at_least_float32(d))) for d in states_RD]
        return torch.stack(each).mean(0)

    def _one(self, deepest_RV: Tensor, targets_R: Tensor, exit_RV: Tensor) -> Tensor:
        here_RV = functional.log_softmax(exit_RV / self.temperature, -1)
        loss_R = self.weight * self.temperature**2 * kl_terms(deepest_RV, here_RV).sum(-1)
        if self.weight == 1:
            return loss_R
        entropy_R = functional.cross_entropy(exit_RV, targets_R, ignore_index=IGNORED, reduction="none")
        return loss_R + (1 - self.weight) * entropy_R
