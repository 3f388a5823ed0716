"""Scaled rotary positions: windows beyond the original context stream through the blocks as through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress import compress
from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.loading.load import load
from llmcompress.model.probe import map_model
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import write_tiny_llama

ORIGINAL, POSITIONS, WINDOW, SHORT = 16, 64, 40, 12
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 1.5, 2.0, 4.0],
        "original_max_position_embeddings": ORIGINAL,
    },
}


def folder_of(kind: str, folder: Path) -> Path:
    # dynamic scaling calls the context that it stretches `max_position_embeddings`; transformers 4 looks for that of
    # longrope beside the scaling, 5 inside
    sizes = {"max_position_embeddings": ORIGINAL if kind == "dynamic" else POSITIONS}
    if kind == "longrope":
        sizes["original_max_position_embeddings"] = ORIGINAL
    scaling = {"rope_type": kind, **SCALINGS[kind]}
    return write_tiny_llama(folder, initializer_range=0.3, rope_scaling=scaling, **sizes)


def windows() -> torch.Tensor:
    return torch.randint(3, 280, (4, WINDOW), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", SCALINGS)
@torch.no_grad()
def test_streamed_equals_whole_beyond_the_original_context(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "model")
    whole = load(folder, dtype=torch.float32).model
    hidden = whole(windows(), output_hidden_states=True).hidden_states
    short = whole(windows()[:, :SHORT], output_hidden_states=True).hidden_states
    model = load(folder, dtype=torch.float32).model
    seen = []
    for work in BlockStream(model, map_model(model), RunContext(windows(), batch=3)):
        seen.append(torch.cat(work.inputs()))
    for index, streamed in enumerate(seen):
        torch.testing.assert_close(streamed, hidden[index], rtol=1e-5, atol=1e-5)
    if kind in ("dynamic", "longrope"):
        assert not torch.allclose(hidden[1][:, :SHORT], short[1], atol=1e-3), "long windows turn by other angles"


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_calibration_and_evaluation_windows_may_be_longer_than_the_original_context(kind: str, tmp_path: Path) -> None:
    text = f"""
calibration: {{samples: 4, tokens: {WINDOW}}}
passes: [{{gptq: {{scheme: int4_g16}}}}]
evaluate: {{perplexity: [{{source: 'builtin:evaluation', window: {WINDOW}, max_windows: 2}}]}}
"""
    report = compress(str(folder_of(kind, tmp_path / "model")), parse_recipe(text, "test"), tmp_path / "out").report
    assert {row.tokens for row in report.sites if row.tokens} == {4 * WINDOW}
    assert report.quality[0].dense.window == WINDOW and not any("cut" in warning for warning in report.warnings)
