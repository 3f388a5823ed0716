"""A tiny model with a space, levels and a bench, shared by the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.space import Space
from tests.families import tiny_model
from tests.passes.test_laws import map_of, windows

SPACE: dict[str, Any] = {
    "sites": {
        "dense": [],
        "rtn4": [{"rtn": {"scheme": "int4_g32", "on_indivisible": "pad"}}],
        "gptq3": [{"gptq": {"scheme": "int3_g32", "on_indivisible": "pad"}}],
        "sparse": [{"wanda": {"sparsity": 0.5}}],
        "rank": [{"svd": {"rank": 8}}],
    },
    "per": "site",
    "bodies": {"whole": [], "ffn-50": [{"width": {"fraction": 0.5, "heads": False}}]},
    "most_dropped": 0.5,
}


def whole_model(family: str = "llama_gqa", *, storage: torch.dtype = torch.float32) -> WholeModel:
    model = tiny_model(family, seed=1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(storage).float()
        parameter.requires_grad_(False)
    return WholeModel(model, map_of(family, model), RunContext(windows(), batch=4, storage_dtype=storage))


def space_of(whole: WholeModel, **changed: Any) -> PlanSpace:
    return PlanSpace(Space.model_validate({**SPACE, **changed}), whole.map)


@contextmanager
def benched(whole: WholeModel, space: PlanSpace, folder: Path | None = None, **options: Any) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as scratch:
        store = build_levels(whole, space, LevelStore(folder or Path(scratch)))
        with Bench(whole, space, store, **options) as bench:
            yield bench


@torch.no_grad()
def full_divergences(dense: PreTrainedModel, other: PreTrainedModel, windows_NT: Tensor) -> Tensor:
    """Slow and obviously right: all logits of both, in float64."""
    p, q = (model(windows_NT[:, :-1]).logits.double().log_softmax(-1) for model in (dense, other))
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def without_state(whole: WholeModel) -> RunContext:
    return replace(whole.context, keep=None, state=None)
