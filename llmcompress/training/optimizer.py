"""AdamW's groups of parameters, and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
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


def schedule(optimizer: Optimizer, settings: Training) -> Callable[[int], None]:
    """Sets the learning rates of step 1, 2, ….

    A step takes the rate in its middle: at its beginning the first would be zero, at its end the last.
    """
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = round(settings.warmup * settings.steps)
    rates = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=settings.steps)

    def set_rates(step: int) -> None:
        for group, base, factor in zip(optimizer.param_groups, rates.base_lrs, rates.lr_lambdas, strict=True):
            group["lr"] = base * factor(step - 0.5)

    return set_rates
