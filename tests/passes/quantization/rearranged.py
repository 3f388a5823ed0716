"""Tiny models that a pass has worked on, shared by the tests of passes that rearrange a model before it is rounded."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import Pass
from llmcompress.recipe import parse_recipe
from llmcompress.records.rows import SiteReport
from tests.families import VOCABULARY, tiny_model


def windows(count: int = 6, tokens: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def map_of(family: str) -> ModelMap:
    return map_model(tiny_model(family, seed=1))


def compressed(
    family: str,
    passes: str | tuple[Pass, ...],
    *,
    dtype: torch.dtype = torch.float32,
    model: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, list[SiteReport]]:
    parsed = parse_recipe(f"passes: {passes}", "test").passes if isinstance(passes, str) else passes
    result = apply_passes(
        tiny_model(family, seed=1) if model is None else model,
        map_of(family),
        parsed,
        RunContext(windows(), batch=4, storage_dtype=dtype),
    )
    return result.model, result.rows


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    return model(windows(2, 16, seed=9) if ids is None else ids).logits


def distance(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor | None = None) -> float:
    """Mean difference of the logits ÷ their mean magnitude."""
    expected = logits(dense, ids)
    return float((logits(model, ids) - expected).abs().mean() / expected.abs().mean())
