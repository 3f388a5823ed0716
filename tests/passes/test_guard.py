"""A block that its passes left worse than plain rounding or magnitude pruning is replaced by that, and it is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.stream import BlockWork
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.model.site import LinearSite
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import BlockPass
from llmcompress.passes.guard import plain_passes, stream_error
from llmcompress.passes.quantization.gptq import GPTQ
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.records.rows import SiteReport
from tests.families import tiny_model
from tests.passes.test_laws import make, map_of, windows

SCHEME = {"scheme": "int2_g32"}
"""So coarse that gptq, whose ranges are searched, is better than plain rounding even on random weights."""
GPTQ2, RTN2 = make("gptq", SCHEME), make("rtn", SCHEME)
WINDOWS, HELD_OUT = windows(count=32), windows(seed=7, count=8)


@pytest.fixture
def ruin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on gptq multiplies the weights of the second block by ten first, and folds a factor into all blocks."""
    sound = GPTQ.apply

    def ruin(factor: float = 1.0) -> None:
        def apply(self: GPTQ, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
            for fold in block.folds_into(sites) if factor != 1 else ():
                block.fold(fold, torch.full((block.producer_channels(fold),), factor))
            if block.info.index == 1:
                for site in sites:
                    site.write(10 * site.weight_OI)
            return sound(self, block, sites)

        monkeypatch.setattr(GPTQ, "apply", apply)

    return ruin


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def guarded(*passes: BlockPass, family: str = "llama_gqa", **context: Any) -> tuple[Any, list[SiteReport]]:
    model = tiny_model(family, seed=1)
    given = RunContext(WINDOWS, batch=8, held_out_NT=HELD_OUT)
    return apply_passes(model, map_of(family, model), passes, replace(given, **context))


def unguarded(*passes: BlockPass) -> Any:
    return guarded(*passes, held_out_NT=None)[0]


def state(model: Any) -> Mapping[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Any, second: Any, part: str = "") -> bool:
    one, other = state(first), state(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one if part in name)


def test_a_ruined_block_is_replaced_by_plain_rounding_and_it_is_told(ruin: Callable[..., None]) -> None:
    sound = unguarded(GPTQ2)
    rounded = unguarded(RTN2)
    ruin()
    progress = Noting()
    model, rows = guarded(GPTQ2, progress=progress)
    ruined = unguarded(GPTQ2)
    assert same(model, rounded, ".layers.1.") and not same(ruined, rounded, ".layers.1.")
    assert same(model, sound, ".layers.0.")
    here = [row for row in rows if ".layers.1." in row.site]
    assert here and all(row.algorithm == "rtn" and "replaced by rtn" in (row.degraded or "") for row in here)
    assert not any("replaced" in (row.degraded or "") for row in rows if ".layers.1." not in row.site)
    (note,) = progress.notes
    assert "layers.1: gptq left its output" in note and all((row.score or 0) > 2 for row in here)


def test_blocks_behind_one_that_fell_back_see_what_it_became(ruin: Callable[..., None]) -> None:
    by_hand = (
        make("gptq", {**SCHEME, "exclude": ("*.layers.1.*",)}),
        make("rtn", {**SCHEME, "sites": ("*.layers.1.*",)}),
    )
    wanted = unguarded(*by_hand)
    ruin()
    assert same(guarded(GPTQ2)[0], wanted)


def test_norms_that_a_pass_scaled_fall_back_with_their_block(ruin: Callable[..., None]) -> None:
    ruin(2.0)
    model, _ = guarded(GPTQ2)
    rounded = unguarded(RTN2)
    assert same(model, rounded, ".layers.1.") and not same(model, rounded, ".layers.0.")


def test_without_held_out_windows_and_for_plain_passes_nothing_is_compared(ruin: Callable[..., None]) -> None:
    ruin()
    ruined = unguarded(GPTQ2)
    model, rows = guarded(GPTQ2, held_out_NT=None)
    assert same(model, ruined) and not any(row.degraded for row in rows)
    assert same(guarded(RTN2)[0], unguarded(RTN2))


@pytest.mark.parametrize(
    ("passes", "plain"),
    [
        ("[{gptq: {scheme: int3_g64, sites: '*_proj'}}]", "[{rtn: {scheme: int3_g64, sites: '*_proj'}}]"),
        ("[smoothquant, {gptq: {scheme: int8_channel_a8token}}]", "[{rtn: {scheme: int8_channel_a8token}}]"),
        ("[{awq: {scheme: int4_g64, overrides: {'*.o_proj': {points: 3, scheme: int8_g64}}}}]",
         "[{rtn: {scheme: int4_g64, overrides: {'*.o_proj': {scheme: int8_g64}}}}]"),
        ("[{wanda: {pattern: '2:4', exclude: '*.o_proj'}}]", "[{magnitude: {pattern: '2:4', exclude: '*.o_proj'}}]"),
        ("[{wanda: {sparsity: 0.4}}, {gptq: {scheme: int4_g64}}]",
         "[{magnitude: {sparsity: 0.4}}, {rtn: {scheme: int4_g64}}]"),
        ("[{sparsegpt: {sparsity: 0.4, scheme: int4_g64}}]",
         "[{magnitude: {sparsity: 0.4}}, {rtn: {scheme: int4_g64}}]"),
        ("[{error_propagation: {scheme: int3_g64}}]", "[{rtn: {scheme: int3_g64}}]"),
        ("[{rtn: {scheme: int3_g64, range: mse}}]", "[]"),
        ("[{magnitude: {comparison: row}}]", "[]"),
        ("[{gptq: {scheme: int8_channel_a8tensor}}]", "[]"),
        ("[{gptq: {scheme: int4_g64, sites: '*.q_proj'}}, {svd: {sites: '*.o_proj'}}]", "[]"),
        ("[svd]", "[]"),
    ],
)  # fmt: skip
def test_the_baseline_of_passes(passes: str, plain: str) -> None:
    found = plain_passes(_blocks(passes), {})
    assert found == (_blocks(plain) if plain != "[]" else [])


def test_the_baseline_of_an_allocation_has_the_same_shares() -> None:
    (wanda,) = _blocks("[{wanda: {sparsity: 0.5, allocation: outliers}}]")
    (plain,) = plain_passes([wanda], {"a": torch.tensor(0.4), "b": torch.tensor(0.6)})
    assert [float(plain.for_site(name).target) for name in "ab"] == pytest.approx([0.4, 0.6])  # type: ignore[attr-defined]


def test_a_state_that_is_not_a_number_is_infinitely_wrong_and_one_loud_token_counts_as_one() -> None:
    wanted = torch.ones(1, 4, 3)
    assert stream_error(wanted, wanted) == 0
    assert stream_error(wanted * torch.nan, wanted) == float("inf")
    wanted[0, 0] = 1e4
    found = wanted.clone()
    found[0, 1:] *= 2
    assert stream_error(found, wanted) == pytest.approx(0.75)


@torch.no_grad()
def test_no_block_of_the_trained_model_falls_back_from_a_sound_pass() -> None:
    loaded = load_for_compression(find_source("builtin:books-llama"), dtype=torch.float32)
    settings = Calibration(source="builtin:calibration", samples=8, tokens=128)
    data = calibration_windows(settings, loaded.tokenizer, max_positions=512, seed=0, progress=Silent(), held_out=1)
    model_map = map_model(loaded.model)
    for passes in ("[{gptq: {scheme: int3_g64}}]", "[sparsegpt]"):
        _, rows = apply_passes(
            copy.deepcopy(loaded.model),
            model_map,
            parse_recipe(f"passes: {passes}", "test").passes,
            RunContext(data.windows_NT, batch=4, held_out_NT=data.held_out_NT),
        )
        assert not any("held-out" in (row.degraded or "") for row in rows)


def _blocks(passes: str) -> list[BlockPass]:
    found = parse_recipe(f"passes: {passes}", "test").passes
    return [each for each in found if isinstance(each, BlockPass)]
