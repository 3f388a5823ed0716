"""AdamW's parameter groups, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from llmcompress.training.settings import Training


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate or a weight decay of their own."""

    parameters: tuple[nn.Parameter, ...]
    learning_rate: float | None = None
    weight_decay: float | None = None


def optimizer_groups(
    model: nn.Module, parameters: Sequence[nn.Parameter | ParameterGroup] | None, settings: Training
) -> list[dict[str, Any]]:
    """AdamW's groups: vectors are not decayed."""
    asked = list(model.parameters()) if parameters is None else parameters
    single = ParameterGroup(tuple(each for each in asked if isinstance(each, nn.Parameter)))
    found: list[dict[str, Any]] = []
    for group in (single, *(each for each in asked if isinstance(each, ParameterGroup))):
        rate = settings.learning_rate if group.learning_rate is None else group.learning_rate
        decay = settings.weight_decay if group.weight_decay is None else group.weight_decay
        matrices = [each for each in group.parameters if each.dim() > 1]
        vectors = [each for each in group.parameters if each.dim() <= 1]
        found += [
            {"params": members, "lr": rate, "weight_decay": decays}
            for members, decays in ((matrices, decay), (vectors, 0.0 if group.weight_decay is None else decay))
            if members
        ]
    assert found, "nothing to train"
    return found


def adamw(groups: list[dict[str, Any]], settings: Training) -> AdamW:
    """With the moments' decay that language models are trained with.

    Fused: otherwise a step makes two copies of the largest weight, often the embedding.
    """
    # on a CPU fused steps read and write a sliced parameter as if it had no gaps, without an error (torch 2.13)
    fused = all(each.is_contiguous() for group in groups for each in group["params"])
    return AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=fused)


def schedule(optimizer: Optimizer, settings: Training, start: int) -> LambdaLR:
    """The learning rates of step `start` + 1 and of those after it.

    A step takes the rate in its middle: at its beginning the first would be zero, at its end the last.
    """
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = round(settings.warmup * settings.steps)
    stand_in = SGD([nn.Parameter(torch.zeros(1))])
    shape = get_scheduler(name, stand_in, num_warmup_steps=warmup, num_training_steps=settings.steps)
    factor: Callable[[float], float] = shape.lr_lambdas[0]
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, lambda done: factor(done + 0.5), last_epoch=start - 1)
