"""MoDeGPT on every family: exact where nothing goes, as small as asked, plain where a config can say it."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.attention import Attention, find_attentions
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from llmcompress.modules.selected import SelectedRows
from llmcompress.numerics.statistics import Gram, Moments
from llmcompress.passes.decomposition.influence import block_influence
from llmcompress.passes.decomposition.modegpt import plan
from llmcompress.passes.decomposition.modegpt_attention import shrink_attention
from llmcompress.passes.decomposition.modegpt_channels import shrink_channels
from llmcompress.passes.decomposition.modegpt_parts import MIXED, Part, parts_of
from tests.families import FAMILIES, tiny_model
from tests.passes.decomposition.factored import block_pass, compressed, map_of, windows

NORMED = ("qwen3", "olmo2", "qwen3_moe")
SOME = ("llama_gqa", "qwen2", "phi", "gpt2", "cohere", "olmo2")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(windows(seed=9, count=2)).logits.double()


def linear_parameters(model: nn.Module, family: str) -> int:
    names = [f"{block.name}.{site.name}" for block in map_of(family).blocks for site in block.structure.sites]
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_rows_and_channels_kept_every_part_leaves_the_logits(family: str) -> None:
    """Values are turned, their bias is moved, readers are fitted anew, and nothing may change."""
    model = tiny_model(family, seed=1)
    dense = logits(model)
    model_map = map_of(family)
    attentions = find_attentions(model, 0, model_map.blocks[0].structure)
    stream = BlockStream(
        model,
        model_map,
        RunContext(windows(count=16), batch=8),
    )
    parts: set[str] = set()
    for block in stream:
        found = parts_of(block.info, attentions, lambda _: True)
        parts |= {part.kind for part in found}
        sizes = {(part.kind, part.number): part.units for part in found}
        for number, attention in enumerate(attentions):
            names = [*(name for name, _ in attention.taps), attention.reader]
            block.measure([block.site(name) for name in names], (Gram, Moments))
            scores = sizes.get(("coupling", number))
            shrink_attention(block, attention, score_rows=scores, value_rows=sizes["values", number])
            block.forget()
        channels = {number: units for (kind, number), units in sizes.items() if kind == "channels"}
        shrink_channels(block, channels, ridge=0.01)
    assert "values" in parts and ("coupling" in parts) == (family not in NORMED)
    torch.testing.assert_close(logits(model), dense, atol=1e-3 * float(dense.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("family", "allocation"),
    [*((family, "influence") for family in FAMILIES), *((family, "uniform") for family in SOME)],
)
def test_the_share_of_parameters_asked_for_is_gone(family: str, allocation: str) -> None:
    before = linear_parameters(tiny_model(family), family)
    model, rows = compressed(family, block_pass("modegpt", fraction=0.25, allocation=allocation))
    after = linear_parameters(model, family)
    blocks = map_of(family).blocks
    attentions = find_attentions(tiny_model(family), 0, blocks[0].structure)
    finest = min(part.parameters * part.step for part in parts_of(blocks[0], attentions, bool))
    rounded = len(blocks) if allocation == "uniform" else 1
    biases = sum(moved_biases(family, attention) for attention in attentions)
    assert abs(after - 0.75 * before) <= 0.51 * finest * rounded + biases * len(blocks)
    totals = [row for row in rows if row.site in {block.name for block in blocks}]
    assert sum(row.removed or 0 for row in totals) == before - after
    assert torch.isfinite(logits(model)).all()
    for row in totals:
        assert (row.degraded == MIXED) == (family in NORMED)


def moved_biases(family: str, attention: Attention) -> int:
    """Biases of values go, and a reader without one gets one: beside the rows and columns that were asked for."""
    structure = map_of(family).blocks[0].structure
    value = attention.channels.locate(attention.groups[0].values[0])[0]
    if not structure.site(value).has_bias:
        return 0
    return sum(len(group.values) for group in attention.groups) + structure.site(attention.reader).outputs


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "cohere"])
def test_ffns_alone_and_all_blocks_alike_give_a_plain_smaller_model(family: str) -> None:
    model, rows = compressed(family, block_pass("modegpt", fraction=0.25, attention=False, allocation="uniform"))
    assert not any(isinstance(module, CompressedModule) for module in model.modules())
    stock = type(model)(copy.deepcopy(model.config)).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(logits(stock), logits(model))
    assert all(row.degraded is None for row in rows)


@pytest.mark.parametrize("family", SOME)
def test_it_reloads_through_its_manifest_and_generates_with_a_cache(family: str) -> None:
    model, _ = compressed(family, block_pass("modegpt", fraction=0.2))
    again = type(model)(copy.deepcopy(model.config)).eval()
    manifest = Manifest.from_json(json.loads(json.dumps(changes(model, again).to_json())))
    apply_manifest(again, manifest, torch.float32)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(again), logits(model))
    ids = windows(count=1, tokens=6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", SOME)
def test_refitted_channels_are_never_worse_than_deleted_ones_and_it_is_deterministic(family: str) -> None:
    model, rows = compressed(family, block_pass("modegpt", fraction=0.3))
    again, rows_again = compressed(family, block_pass("modegpt", fraction=0.3))
    assert rows == rows_again and torch.equal(logits(model), logits(again))
    refitted = [row for row in rows if row.error_before is not None]
    assert refitted and all(row.error is not None and row.error <= row.error_before for row in refitted)


def test_rotary_pairs_stay_whole_and_are_the_same_for_all_query_heads_of_a_group() -> None:
    model, _ = compressed("llama_gqa", block_pass("modegpt", fraction=0.25, allocation="uniform"))
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, SelectedRows) and isinstance(attention.k_proj, SelectedRows)
    width = 16
    for group in range(2):
        of_key = {int(row) - group * width for row in attention.k_proj.index_K if row // width == group}
        assert {(row + width // 2) % width for row in of_key} == of_key
        for head in (2 * group, 2 * group + 1):
            assert {int(row) - head * width for row in attention.q_proj.index_K if row // width == head} == of_key


def test_blocks_that_change_their_input_least_lose_most() -> None:
    _, rows = compressed("llama", block_pass("modegpt", fraction=0.3, temperature=0.05))
    blocks = sorted((row for row in rows if row.score is not None), key=lambda row: row.score or 0)
    removed = [row.removed or 0 for row in blocks]
    assert removed == sorted(removed, reverse=True) and removed[0] > removed[-1]


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "falcon"])
def test_influence_is_one_minus_the_cosine_of_what_enters_and_leaves_a_block(family: str) -> None:
    model = tiny_model(family, seed=1)
    with torch.no_grad():
        hidden = model(windows(), output_hidden_states=True).hidden_states
    whole = WholeModel(
        model,
        map_of(family),
        RunContext(windows(), batch=4),
    )
    found = block_influence(whole)
    # the last hidden state is shown behind the final norm
    for index, (before, after) in enumerate(pairwise(hidden[:-1])):
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert float(found[index]) == pytest.approx(1 - float(cosine), abs=1e-5)
    assert len(found) == len(hidden) - 1 and 0 <= float(found.min()) <= float(found.max()) <= 2


def test_only_selected_blocks_pay_for_all() -> None:
    before = linear_parameters(tiny_model("llama"), "llama")
    model, rows = compressed("llama", block_pass("modegpt", fraction=0.2, exclude=("*.layers.0.*",)))
    assert linear_parameters(model, "llama") == pytest.approx(0.8 * before, abs=200)
    assert not any(".layers.0" in row.site for row in rows)
    untouched = tiny_model("llama", seed=1).model.layers[0].state_dict()
    for key, value in model.model.layers[0].state_dict().items():
        assert torch.equal(value, untouched[key])


def test_more_than_can_go_is_refused_with_what_can() -> None:
    with pytest.raises(CompressError, match=r"limit is 90\.0%"):
        compressed("llama", block_pass("modegpt", fraction=0.95))
    with pytest.raises(CompressError, match="cannot remove"):
        compressed("llama", block_pass("modegpt", fraction=0.2, attention=False, exclude="*.mlp.*"))


def test_at_ratio_zero_nothing_is_touched() -> None:
    model, rows = compressed("llama_gqa", block_pass("modegpt", fraction=0.0))
    assert rows == []
    assert torch.equal(logits(model), logits(tiny_model("llama_gqa", seed=1)))


def test_quantizing_afterwards_works_on_what_is_left() -> None:
    _, rows = compressed(
        "llama_gqa", block_pass("modegpt", fraction=0.2, allocation="uniform"), block_pass("rtn", scheme="int8_channel")
    )
    names = {row.site.rsplit(".layers.", 1)[1] for row in rows if row.algorithm == "rtn"}
    assert {"0.self_attn.q_proj.kept", "0.self_attn.o_proj.kept", "0.mlp.down_proj"} <= names


def test_a_plan_takes_the_same_share_of_every_part_and_ends_near_the_target() -> None:
    parts = [Part("coupling", 0, 16, 2, 100), Part("values", 0, 16, 1, 100), Part("channels", 0, 1000, 1, 7)]
    kept, removed = plan(parts, 2550.0)
    assert kept[0] == 12 and kept[1] == 12 and abs(removed - 2550) <= 3.5
    assert plan(parts, -5.0) == ([16, 16, 1000], 0)
    assert min(plan(parts, 10**9)[0]) >= 1
