"""Laws of quality, on weights that were trained: with random ones a pass that falls back to plain rounding passes too.

Every measure is of text that no pass has seen. Limits lie a good way above what was measured: a method that falls back,
ignores an option or minimises the wrong thing is at 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.records.rows import SiteReport

RTN, RTN_2, MAGNITUDE = "[{rtn: {scheme: int3_g32}}]", "[{rtn: {scheme: int2_g32}}]", "[{magnitude: {sparsity: 0.5}}]"
GPTQ, WANDA = "[{gptq: {scheme: int3_g32}}]", "[{wanda: {sparsity: 0.5}}]"
NARROWER = "[{{width: {{fraction: 0.25, score: {score}, refit: {refit}}}}}]"


@dataclass(frozen=True)
class Result:
    rows: list[SiteReport]
    distance: float
    """Mean squared difference of the logits from the dense model's."""
    loss: float
    """Mean negative log-likelihood of a token."""

    def ratio(self) -> float:
        """Geometric mean over sites of the error ÷ that of the pass's own baseline."""
        ratios = [row.error / row.error_before for row in self.rows if row.error and row.error_before]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))


@pytest.fixture(scope="module")
def results() -> Callable[[str], Result]:
    """Each recipe is applied to the bundled model once, whatever asks for it."""
    loaded = load_for_compression(find_source("builtin:books-llama"), dtype=torch.float32)
    model, model_map = loaded.model, map_model(loaded.model)

    def windows(source: str, samples: int, tokens: int) -> Tensor:
        settings = Calibration(source=f"builtin:{source}", samples=samples, tokens=tokens)
        found = calibration_windows(settings, loaded.tokenizer, max_positions=512, seed=0, progress=Silent())
        return found.windows_NT

    calibrating, held_out = windows("calibration", 24, 128), windows("evaluation", 8, 256)
    with torch.no_grad():
        dense = model(held_out, use_cache=False).logits

    @cache
    def result(passes: str) -> Result:
        found, rows = apply_passes(
            copy.deepcopy(model),
            model_map,
            parse_recipe(f"passes: {passes}", "test").passes,
            RunContext(calibrating, batch=8),
        )
        with torch.no_grad():
            logits = found(held_out, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
        return Result(rows, float((logits - dense).square().mean()), float(loss))

    return result


SITEWISE = {
    GPTQ: 0.6,
    "[{gptq: {scheme: int3_g64}}]": 0.6,
    "[{awq: {scheme: int3_g64}}]": 0.8,
    "[{learned_rounding: {scheme: int3_g32, steps: 100}}]": 0.8,
    "[{error_propagation: {scheme: int3_g32}}]": 0.6,
    "[smoothquant, {gptq: {scheme: int3_g32}}]": 0.6,
    "[{awq: {scheme: int3_g64, round: false}}, {gptq: {scheme: int3_g64}}]": 0.6,
    "[{low_rank_correction: {quantizer: {rtn: {scheme: int2_g32}}, rank: 8}}]": 0.75,
    "[{sparsegpt: {sparsity: 0.5}}]": 0.6,
    "[{wanda: {sparsity: 0.5}}]": 0.95,
}


@pytest.mark.parametrize("passes", SITEWISE)
def test_sites_err_far_less_than_the_baseline_and_none_falls_back_to_it(
    passes: str, results: Callable[[str], Result]
) -> None:
    found = results(passes)
    assert not [row for row in found.rows if row.degraded]
    assert found.ratio() < SITEWISE[passes]


ORDERINGS = {
    "gptq, rtn": (GPTQ, RTN, 0.7),
    "awq, rtn": ("[{awq: {scheme: int3_g64}}]", "[{rtn: {scheme: int3_g64}}]", 0.8),
    "hqq, rtn": ("[{hqq: {scheme: int3_g32}}]", RTN, 0.95),
    "learned rounding, rtn": ("[{learned_rounding: {scheme: int3_g32, steps: 100}}]", RTN, 0.7),
    "error propagation, rtn": ("[{error_propagation: {scheme: int3_g32}}]", RTN, 0.75),
    "smoothed, gptq, rtn": (
        "[smoothquant, {gptq: {scheme: int3_g32}}]",
        "[smoothquant, {rtn: {scheme: int3_g32}}]",
        0.75,
    ),
    "awq scales, gptq, rtn": (
        "[{awq: {scheme: int3_g64, round: false}}, {gptq: {scheme: int3_g64}}]",
        "[{rtn: {scheme: int3_g64}}]",
        0.75,
    ),
    "ranges searched or covered": (GPTQ, "[{gptq: {scheme: int3_g32, range: minmax}}]", 0.95),
    "eight bits, smoothed or not": (
        "[smoothquant, {rtn: {scheme: int8_channel_a8tensor}}]",
        "[{rtn: {scheme: int8_channel_a8tensor}}]",
        0.5,
    ),
    "a branch beside two bits": (
        "[{low_rank_correction: {quantizer: {rtn: {scheme: int2_g32}}, rank: 8}}]",
        RTN_2,
        0.8,
    ),
    "caldera, rtn": ("[{caldera: {scheme: int2_g32, rank: 8, iterations: 2}}]", RTN_2, 0.4),
    "wanda, magnitude": (WANDA, MAGNITUDE, 0.9),
    "sparsegpt, wanda": ("[{sparsegpt: {sparsity: 0.5}}]", WANDA, 0.85),
    "wanda, magnitude, 2:4": ("[{wanda: {pattern: '2:4'}}]", "[{magnitude: {pattern: '2:4'}}]", 0.9),
    "sparsegpt, wanda, 2:4": ("[{sparsegpt: {pattern: '2:4'}}]", "[{wanda: {pattern: '2:4'}}]", 0.8),
    "factors, whitened or not": ("[{svd: {fraction: 0.3}}]", "[{svd: {fraction: 0.3, whitening: none}}]", 0.65),
    "narrower, refitted or not": (
        NARROWER.format(score="activation", refit="columns"),
        NARROWER.format(score="activation", refit="none"),
        0.85,
    ),
    "narrower, by activations or weights": (
        NARROWER.format(score="activation", refit="none"),
        NARROWER.format(score="l2", refit="none"),
        0.5,
    ),
}
"""The better of two, the other, and a limit on the ratio of their distances from the dense model."""


@pytest.mark.parametrize("name", ORDERINGS)
def test_on_other_text_the_better_method_is_better(name: str, results: Callable[[str], Result]) -> None:
    better, other, limit = ORDERINGS[name]
    assert results(better).distance < limit * results(other).distance


@pytest.mark.parametrize("name", [name for name in ORDERINGS if name.endswith(", rtn")])
def test_on_other_text_quantizers_lose_less_likelihood_than_plain_rounding(
    name: str, results: Callable[[str], Result]
) -> None:
    better, other, _ = ORDERINGS[name]
    assert results(better).loss < results(other).loss
