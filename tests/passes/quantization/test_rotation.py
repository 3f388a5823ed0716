"""Rotation is exact on every family or refused with the reason; codes behind it reload; learning never ends worse."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.model.stock import stock_model
from llmcompress.modules.manifest import changes
from llmcompress.passes.quantization.rotation import Rotation
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.order import check_order, check_sites
from tests.families import FAMILIES, tiny_model
from tests.passes.quantization.rearranged import compressed, logits, map_of

REFUSED = {"gemma2": "scales individual channels", "olmo2": "post-norm"}
OPTIONS = {
    "hadamard": "{heads: false}",
    "random": "{heads: false, basis: random}",
    "heads": "{stream: false}",
    "everything": "{online: true}",
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_stay_or_the_reason_is_told(family: str, name: str) -> None:
    passes = f"[{{rotation: {OPTIONS[name]}}}]"
    if family in REFUSED and name != "heads":
        with pytest.raises(CompressError, match=REFUSED[family]):
            compressed(family, passes)
        return
    dense = tiny_model(family, seed=1)
    inner = [site for site in map_of(family).site_names() if "experts" not in site]
    if name == "everything" and not Rotation(online=True)._online_sites(map_of(family)):
        with pytest.raises(CompressError, match="hidden activations of an FFN"):
            compressed(family, passes)
        return
    model, rows = compressed(family, passes)
    expected = logits(dense)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert inner and {row.site for row in rows} == {block.name for block in map_of(family).blocks}
    assert not any(row.degraded for row in rows)
    moved = [
        key
        for key, tensor in model.state_dict().items()
        if key in dense.state_dict() and "q_proj.weight" in key and not torch.equal(tensor, dense.state_dict()[key])
    ]
    assert name == "heads" or moved or "q_proj" not in "".join(inner), "nothing was rotated"


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "llama_odd", "qwen2", "opt", "gpt2", "gpt_neox", "phi"])
def test_a_folded_rotation_leaves_a_stock_model_with_a_plain_config(family: str) -> None:
    model, _ = compressed(family, "[rotation]")
    assert not changes(model, stock_model(model))
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_outlier_channel_of_the_stream_is_spread_over_all_channels(family: str) -> None:
    def peaks(model: torch.nn.Module) -> float:
        embedding = model.get_input_embeddings().weight.detach()
        return float((embedding.abs().amax(1) / embedding.square().mean(1).sqrt()).mean())

    dense = tiny_model(family, seed=1)
    dense.get_input_embeddings().weight.data[:, 5] *= 50
    before = peaks(dense)
    rotated, _ = compressed(family, "[rotation]", model=dense)
    assert before > 7 and peaks(rotated) < 2.5


def test_the_seed_decides_and_bases_differ() -> None:
    one, again = (compressed("llama", "[rotation]")[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, again[key]) for key, tensor in one.items())
    other = compressed("llama", "[{rotation: {basis: random}}]")[0].state_dict()
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    "first", ["{width: {fraction: 0.25, score: l2}}", "{slicegpt: {fraction: 0.25}}", "{svd: {fraction: 0.2}}"]
)
def test_it_follows_pruning_and_factoring(first: str) -> None:
    before, _ = compressed("llama_gqa", f"[{first}]")
    model, _ = compressed("llama_gqa", f"[{first}, rotation]")
    expected = logits(before)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_names_of_later_passes_are_those_behind_the_transform() -> None:
    passes = parse_recipe("passes: [{rotation: {online: true}}, {rtn: {sites: '*.down_proj.kept'}}]", "test").passes
    names = map_of("llama").site_names()
    known = [each.for_model(map_of("llama")) for each in passes]
    check_sites(known, names)
    check_order(known, names)
    with pytest.raises(CompressError, match="matches no site"):
        check_sites([known[0], known[1].model_copy(update={"sites": ("*.down_proj",)})], names)
    assert Rotation(online="*.0.*").names_after("m.0.fc2") == ("m.0.fc2.kept",)
    assert Rotation().names_after("m.0.fc2") == ("m.0.fc2",)
    assert not Rotation().uses_data() and Rotation(learned={}).uses_data()
    assert (
        map_model(compressed("llama", "[{rotation: {online: '*.1.*'}}]")[0])
        .site_names()
        .count("model.layers.1.mlp.down_proj.kept")
    )


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_learning_is_exact_and_never_ends_worse_than_it_began(family: str, validation: float) -> None:
    learned = f"{{steps: 6, batch: 2, scheme: int3_channel_a8token, learning_rate: 0.02, validation: {validation}}}"
    model, rows = compressed(family, f"[{{rotation: {{learned: {learned}}}}}]")
    expected = logits(tiny_model(family, seed=1))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert rows[0].score is not None and rows[0].score <= 0
    if not validation:  # random tokens: only what was learned from can get better
        assert rows[0].score < 0
    assert not changes(model, stock_model(model))


def test_what_cannot_be_is_refused() -> None:
    assert (
        Rotation().conflict_with("zeros")
        and Rotation().conflict_with("codes")
        and Rotation().conflict_with("shapes") is None
    )
    with pytest.raises(ValidationError, match="`stream` must be true"):
        Rotation(stream=False, learned={})
    with pytest.raises(CompressError, match="hidden activations of an FFN"):
        Rotation(online="*.q_proj").check(map_of("llama"))
    with pytest.raises(ValidationError, match="not a quantization scheme"):
        Rotation(learned={"scheme": "int99"})
