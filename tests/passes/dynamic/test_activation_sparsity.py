from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.model.units import feed_forward_readers
from llmcompress.modules.dynamic import tallied
from llmcompress.modules.dynamic_activations import ThresholdedLinear
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.dynamic.activation_sparsity import ActivationSparsity
from tests.families import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))

READERS = {
    "llama_gqa": {"mlp.down_proj"},
    "gpt2": {"mlp.c_proj"},
    "opt": {"fc2"},
    "falcon": {"mlp.dense_4h_to_h"},
}


def apply(family: str, **options: Any) -> tuple[Any, Any, Any]:
    model = tiny_model(family, seed=1)
    model_map = map_model(model)
    result = apply_passes(
        model,
        model_map,
        (ActivationSparsity(**options),),
        RunContext(WINDOWS, batch=4),
    )
    return result.model, result.rows, model_map


@pytest.mark.parametrize("family", READERS)
@torch.no_grad()
def test_at_sparsity_0_the_logits_stay_and_by_default_only_the_feed_forward_is_touched(family: str) -> None:
    dense = tiny_model(family, seed=1)(WINDOWS).logits
    model, rows, model_map = apply(family, sparsity=0.0)
    torch.testing.assert_close(model(WINDOWS).logits, dense, atol=1e-5, rtol=1e-5)
    assert feed_forward_readers(model_map.blocks[0].structure) == READERS[family]
    touched = {name for name, part in model.named_modules() if isinstance(part, ThresholdedLinear)}
    assert (
        touched
        == {row.site for row in rows}
        == {block.full(name) for block in model_map.blocks for name in READERS[family]}
    )
    # a rectifier leaves zeros: they need no threshold to be left out
    assert all(row.score == 0 for row in rows)


@torch.no_grad()
def test_the_share_asked_for_is_left_out_on_calibration_text() -> None:
    model, rows, _ = apply("llama_gqa", sparsity=0.4, inputs="all")
    assert len(rows) == 21 and all(row.active == pytest.approx(0.6, abs=0.01) for row in rows)
    with tallied(model) as counts:
        model(WINDOWS)
    assert set(counts) == {row.site for row in rows}
    assert all(count.share == pytest.approx(0.6, abs=0.05) for count in counts.values())


def test_overrides_and_globs_choose_sites_and_shares() -> None:
    _, rows, _ = apply(
        "llama_gqa",
        sparsity=0.5,
        inputs="all",
        sites=("*.mlp.*",),
        exclude=("*.0.*",),
        overrides={"*.down_proj": {"sparsity": 0.9}},
    )
    shares = {row.site.removeprefix("model.layers."): round(row.active, 2) for row in rows}
    assert shares == {
        f"{block}.mlp.{name}": share for block in (1, 2) for name, share in
        {"gate_proj": 0.5, "up_proj": 0.5, "down_proj": 0.1}.items()
    }  # fmt: skip


def test_a_model_without_a_feed_forward_among_the_sites_is_refused_before_work() -> None:
    model_map = map_model(tiny_model("llama_gqa"))
    with pytest.raises(CompressError) as caught:
        ActivationSparsity(sites=("*.q_proj",)).check(model_map)
    assert caught.value.code == "dynamic.no-sites" and "inputs: all" in caught.value.fix
