"""Tiny random models with passes applied to them, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.records.rows import SiteReport
from tests.families import VOCABULARY, tiny_model

_maps: dict[str, ModelMap] = {}


def map_of(family: str) -> ModelMap:
    """Mapping is the slowest part; every test of a family shares it."""
    if family not in _maps:
        _maps[family] = map_model(tiny_model(family, seed=1))
    return _maps[family]


def windows(seed: int = 0, count: int = 6, tokens: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, tokens), generator=generator)


def block_pass(name: str, **options: Any) -> BlockPass:
    """A pass made as a recipe would make it."""
    made = PASSES[name](**options)
    assert isinstance(made, BlockPass)
    return made


def compressed(
    family: str,
    *passes: Pass,
    dtype: torch.dtype = torch.float32,
    data: Tensor | None = None,
    model: PreTrainedModel | None = None,
) -> tuple[Any, list[SiteReport]]:
    """The family's model (or the given one of that family) after the passes, and their report."""
    found = apply_passes(
        tiny_model(family, seed=1) if model is None else model,
        map_of(family),
        passes,
        RunContext(windows() if data is None else data, batch=4, storage_dtype=dtype),
    )
    return found.model, found.rows


def whole_model(family: str) -> WholeModel:
    """The dense model as a pass sees it that decides."""
    return WholeModel(
        tiny_model(family, seed=1),
        map_of(family),
        RunContext(windows(), batch=4),
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """On tokens no pass has seen."""
    return model(windows(seed=9, count=2)).logits.double()
