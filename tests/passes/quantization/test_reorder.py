"""Reordering is exact on every family, more clusters round better, and ranges that are fixed are not changed later."""

from __future__ import annotations

import pytest
import torch

from llmcompress.model.units import feed_forward_readers
from llmcompress.modules.transformed_input import ClusteredInput
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.reorder import Reorder
from tests.families import FAMILIES, tiny_model
from tests.passes.quantization.rearranged import compressed, distance, logits, map_of, windows


def clustered(model: torch.nn.Module) -> dict[str, ClusteredInput]:
    return {name: part for name, part in model.named_modules() if isinstance(part, ClusteredInput)}


@pytest.mark.parametrize("family", FAMILIES)
def test_reordering_alone_leaves_the_logits(family: str) -> None:
    model, rows = compressed(family, "[{reorder: {bits: null, clusters: 5}}]")
    expected = logits(tiny_model(family, seed=1))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    names = set(map_of(family).site_names())
    assert {row.site for row in rows} == names == set(clustered(model))
    # the inside of an ordinary FFN is permuted where it is made; everything else is gathered
    folded = {name for name, part in clustered(model).items() if part.index_I is None}
    blocks = map_of(family).blocks
    assert folded == {block.full(name) for block in blocks for name in feed_forward_readers(block.structure)}
    assert len({tuple(part.sizes) for part in clustered(model).values()}) > 1


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_more_clusters_never_round_worse(family: str) -> None:
    errors = []
    for count in (1, 4, 32):
        _, rows = compressed(family, f"[{{reorder: {{clusters: {count}, bits: 4}}}}]")
        first = [row for row in rows if ".0." in row.site]  # later blocks get other inputs
        errors.append(sum(row.error or 0.0 for row in first))
        if count == 1:
            assert all(row.error == row.error_before for row in rows)
    assert errors[0] > errors[1] > errors[2]


def test_on_what_it_was_measured_on_eight_bits_hardly_move_the_logits() -> None:
    for family in ("llama_gqa", "gpt2", "opt"):
        model, _ = compressed(family, "[{reorder: {clusters: 32, bits: 8}}]")
        assert distance(model, tiny_model(family, seed=1), windows()) < 0.05


def test_scales_are_values_of_the_stored_type_and_shared_inputs_share_them() -> None:
    model, _ = compressed("llama_gqa", "[{reorder: {clusters: 6}}]", dtype=torch.bfloat16)
    parts = clustered(model)
    for part in parts.values():
        assert torch.equal(part.scale_K, part.scale_K.bfloat16().float())
    one, other = (parts[f"model.layers.1.self_attn.{name}_proj"] for name in "qk")
    assert torch.equal(one.scale_K, other.scale_K) and torch.equal(one.index_I, other.index_I)


def test_only_selected_sites_change_and_an_unselected_producer_is_not_permuted() -> None:
    before = tiny_model("llama_gqa", seed=1).state_dict()
    model, rows = compressed("llama_gqa", (Reorder(sites=("*.1.*.down_proj",)),))
    assert [row.site for row in rows] == ["model.layers.1.mlp.down_proj"]
    part = clustered(model)["model.layers.1.mlp.down_proj"]
    assert part.index_I is not None
    for key, tensor in model.state_dict().items():
        if "layers.1.mlp.down_proj" not in key:
            assert torch.equal(tensor, before[key]), key


def test_overrides_give_sites_other_clusters_and_bits() -> None:
    model, _ = compressed("llama", (Reorder(clusters=6, overrides={"*.down_proj": {"clusters": 2, "bits": 4}}),))
    down, q = (clustered(model)[f"model.layers.0.{name}_proj"] for name in ("mlp.down", "self_attn.q"))
    assert (len(down.sizes), down.bits, len(q.sizes), q.bits) == (2, 4, 6, 8)


def test_passes_that_would_change_fixed_ranges_are_refused() -> None:
    for name in ("smoothquant", "awq", "outlier_suppression", "reorder", "svd", "rotation", "width"):
        assert PASSES[name]().conflict_with("ranges"), name
    for name in ("gptq", "rtn"):
        assert PASSES[name]().conflict_with("ranges") is None, name
    assert Reorder().conflict_with("pattern") and Reorder().conflict_with("zeros") is None
