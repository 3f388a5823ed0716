"""Adversarial distillation: the student must predict what the teacher does although its inputs are perturbed.

B = samples, T = tokens, D = width of an embedding, R = rows (positions of all samples), V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.training.objectives.base import OBJECTIVES, Objective, ObjectiveInputs
from llmcompress.training.objectives.kl import KL
from llmcompress.training.teacher import Teacher

_STEP = 2.5
"""Length of all steps together, in radii: enough to reach the border of the ball from anywhere inside it."""


@OBJECTIVES.register("adversarial")
class Adversarial(BaseModel, Objective):
    """KL(teacher ‖ student), where the student reads the embeddings that confuse it most within a small ball.

    The perturbation of every token's embedding begins at random and follows the gradient of the divergence for `steps`
    steps, each with a forward and a backward pass of the student; the teacher reads the unperturbed text. In validation
    nothing is perturbed.

    Source: Goldblum et al., arXiv 1905.09747, equation 3 (ARD); Zhu et al., arXiv 1909.11764 (FreeLB: perturbed
    embeddings); Madry et al., arXiv 1706.06083 (projected gradient ascent, its step length). Differs: the radius holds
    for each token, relative to the root mean square norm of the batch's embeddings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    radius: float = Field(default=0.1, gt=0)
    """Norm of the perturbation of a token ÷ norm of embeddings."""
    steps: int = Field(default=1, ge=1)
    """Steps of gradient ascent."""
    factor: float = Field(default=1.0, gt=0)
    """What the loss is multiplied by, where it is added to others."""

    _embedding: list[nn.Module] = PrivateAttr(default_factory=list)

    @override
    def needs_teacher(self) -> bool:
        return True

    @override
    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        self._embedding[:] = [student.get_input_embeddings()]
        return []

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        if not inputs.step:
            return self.factor * inputs.mean_over_tokens(KL().per_token)
        with torch.no_grad():
            clean_BTD = self._embedding[0](inputs.batch.ids_BT)
        radius = self.radius * float(clean_BTD.float().square().sum(-1).mean().sqrt())
        # drawn on the CPU, whose generator's state a training saves
        change_BTD = _within(torch.randn(clean_BTD.shape).to(clean_BTD.device), radius, scale=True)
        for _ in range(self.steps):
            change_BTD.requires_grad_(True)
            (rise_BTD,) = torch.autograd.grad(self._divergence(inputs, change_BTD), change_BTD)
            step_BTD = functional.normalize(rise_BTD, dim=-1) * (_STEP * radius / self.steps)
            change_BTD = _within(change_BTD.detach() + step_BTD, radius)
        return self.factor * self._divergence(inputs, change_BTD)

    def _divergence(self, inputs: ObjectiveInputs, change_BTD: Tensor) -> Tensor:
        with _perturbed(self._embedding[0], change_BTD):
            student = inputs.again()
        return replace(inputs, student=student).mean_over_tokens(KL().per_token)


def _within(change_BTD: Tensor, radius: float, *, scale: bool = False) -> Tensor:
    """Every token's vector cut to the radius; with `scale` at a random distance within it."""
    norm_BT1 = change_BTD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    length_BT1 = radius * torch.rand(norm_BT1.shape).to(norm_BT1) if scale else norm_BT1.clamp(max=radius)
    cut_BTD: Tensor = change_BTD / norm_BT1 * length_BT1
    return cut_BTD


@contextmanager
def _perturbed(embedding: nn.Module, change_BTD: Tensor) -> Iterator[None]:
    """Everything that is embedded while this lasts is changed."""

    def change(_: nn.Module, __: Any, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD + change_BTD.to(embedded_BTD.dtype)

    handle = embedding.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
