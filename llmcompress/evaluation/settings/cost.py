"""`cost:` speed, peak memory and energy of both models on this device, measured in turns when all else is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, MetricSettings

Positive = Annotated[int, Field(ge=1)]


@METRIC_SETTINGS.register("cost")
class CostRequest(MetricSettings):
    """What models cost on this device; for `evaluate` and `compare`: compression keeps one model open at a time."""

    only_one: ClassVar[bool] = True

    batches: tuple[Positive, ...] = (1,)
    """Sequences that are run together; every batch size with every context."""
    contexts: tuple[Positive, ...] = (128,)
    """Tokens of the prompt."""
    new_tokens: int = Field(default=32, ge=2)
    """Tokens that are decoded."""
    repeats: int = Field(default=5, ge=1)
    """Turns that are timed, after one that is not."""
    skip: tuple[Literal["memory", "energy", "limits"], ...] = ()
    """What is not measured: peak memory takes a fresh process for every model."""


def cost_request(settings: Iterable[MetricSettings]) -> CostRequest | None:
    """The request among settings."""
    return next((each for each in settings if isinstance(each, CostRequest)), None)


def refuse_cost(settings: Iterable[MetricSettings]) -> None:
    """Raises: CompressError where cost is asked for and only one model can be open."""
    if cost_request(settings) is not None:
        raise CompressError(
            "evaluate.cost",
            "cost is not measured during compression: both models must be open at the same time",
            where="evaluate.cost",
            fix="remove it from the recipe, and evaluate the result with the dense model as its baseline",
            exit_code=ExitCode.USAGE,
        )
