"""The map found by experiment is what a person reading each family's source would write down."""

from __future__ import annotations

import copy
import functools
import json
import resource
import time
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import CompressError
from llmcompress.model.block_experiment import BlockExperiment
from llmcompress.model.describe import describe, ranges
from llmcompress.model.folds import legal
from llmcompress.model.map import Fold, InputGroup, WidthGroup, WidthPart
from llmcompress.model.probe import map_model, probe, without_weights
from llmcompress.model.skeleton import find_blocks, record
from llmcompress.model.surgery import apply_fold
from llmcompress.model.widths import removable
from tests.families import FAMILIES, FFN, HIDDEN, tiny_config, tiny_model, tiny_tokens

EXPERTS_ARE_LINEARS = transformers.__version__.startswith("4.")
"""transformers 5 keeps the experts of a block in one 3-D parameter."""


@functools.cache
def map_of(family):
    return probe(tiny_config(family))


def structure_of(family):
    return map_of(family).blocks[0].structure


def plain(channels, start=0):
    return tuple(range(start, start + channels))


def grouped(kv, repeats, size, start=0, stride=None):
    """Rows that feed o's columns: every KV head's `size` value rows, once per query head."""
    stride = stride or size
    return tuple(start + head * stride + i for head in range(kv) for _ in range(repeats) for i in range(size))


@dataclass(frozen=True)
class Expected:
    """Groups of sites that share an input; folds as producer → (consumers, channel map, offset); units of widths."""

    groups: list[tuple[str, ...]]
    folds: dict[str, tuple[tuple[str, ...], tuple[int, ...], float]]
    units: tuple[int, ...]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O, DOWN = "self_attn.o_proj", "mlp.down_proj"


def llama(
    kv=2, repeats=2, size=16, ffn=FFN, hidden=HIDDEN, norms=("input_layernorm", "post_attention_layernorm"), offset=0.0
):
    channels = plain(hidden)
    folds = {
        norms[0]: (QKV, channels, offset),
        norms[1]: (GATE_UP, channels, offset),
        QKV[2]: ((O,), grouped(kv, repeats, size), 0.0),
        GATE_UP[1]: ((DOWN,), plain(ffn), 0.0),
    }
    return Expected([QKV, (O,), GATE_UP, (DOWN,)], folds, (kv, ffn) if kv > 1 else (ffn,))


def parallel_llama():
    folds = {
        "input_layernorm": (QKV + GATE_UP, plain(HIDDEN), 0.0),
        QKV[2]: ((O,), grouped(2, 2, 16), 0.0),
        GATE_UP[1]: ((DOWN,), plain(FFN), 0.0),
    }
    return Expected([QKV + GATE_UP, (O,), (DOWN,)], folds, (2, FFN))


def fused(attention, qkv, mlp, norms, values, units, ffn=FFN):
    """LayerNorm → fused qkv → dense, LayerNorm → up → GELU → down: no fold across the GELU."""
    qkv, dense = f"{attention}.{qkv[0]}", f"{attention}.{qkv[1]}"
    up, down = (f"mlp.{name}" for name in mlp)
    folds = {
        norms[0]: ((qkv,), plain(HIDDEN), 0.0),
        norms[1]: ((up,), plain(HIDDEN), 0.0),
        qkv: ((dense,), values, 0.0),
    }
    return Expected([(qkv,), (dense,), (up,), (down,)], folds, units)


def phi():
    sites = (*QKV, "mlp.fc1")
    folds = {
        "input_layernorm": (sites, plain(HIDDEN), 0.0),
        QKV[2]: (("self_attn.dense",), plain(HIDDEN), 0.0),
    }
    return Expected([sites, ("self_attn.dense",), ("mlp.fc2",)], folds, (4, FFN))


def phi3():
    qkv, gate_up = "self_attn.qkv_proj", "mlp.gate_up_proj"
    folds = {
        "input_layernorm": ((qkv,), plain(HIDDEN), 0.0),
        "post_attention_layernorm": ((gate_up,), plain(HIDDEN), 0.0),
        qkv: ((O,), grouped(2, 2, 16, start=96), 0.0),
        gate_up: ((DOWN,), plain(FFN, start=FFN), 0.0),
    }
    return Expected([(qkv,), (O,), (gate_up,), (DOWN,)], folds, (2, FFN))


def opt():
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    folds = {
        "self_attn_layer_norm": (qkv, plain(HIDDEN), 0.0),
        "final_layer_norm": (("fc1",), plain(HIDDEN), 0.0),
        "self_attn.v_proj": (("self_attn.out_proj",), plain(HIDDEN), 0.0),
        "fc1": (("fc2",), plain(FFN), 0.0),  # exact only because ReLU is positively homogeneous
    }
    return Expected([qkv, ("self_attn.out_proj",), ("fc1",), ("fc2",)], folds, (4, FFN))


def falcon_mqa():
    qkv, dense, up, down = (
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    folds = {
        "input_layernorm": ((qkv, up), plain(HIDDEN), 0.0),
        qkv: ((dense,), grouped(1, 4, 16, start=80), 0.0),
    }
    return Expected([(qkv, up), (dense,), (down,)], folds, (FFN,))


def olmo2():
    llama_ = llama()
    without_norms = {name: fold for name, fold in llama_.folds.items() if "norm" not in name}
    # its q and k norms span all heads, so no head can be removed by itself
    return Expected(llama_.groups, without_norms, (FFN,))


def mixture(experts, gate_up, down, ffn):
    """The norm before the experts feeds the router too, which must not change: no fold there."""
    groups, folds, units = [QKV, (O,)], dict(list(llama().folds.items())), (2,)
    del folds["post_attention_layernorm"], folds[GATE_UP[1]]
    if EXPERTS_ARE_LINEARS:
        for index in range(4):
            groups += [tuple(f"{experts}.{index}.{name}" for name in gate_up), (f"{experts}.{index}.{down}",)]
            folds[f"{experts}.{index}.{gate_up[1]}"] = ((f"{experts}.{index}.{down}",), plain(ffn), 0.0)
            units += (ffn,)
    return Expected(groups, folds, units)


H_TO_4H = ("dense_h_to_4h", "dense_4h_to_h")
DENSE = ("query_key_value", "dense")
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
HEADS_OF_THREE = grouped(4, 1, 16, start=32, stride=48)
"""v rows of a projection laid out as heads × (q, k, v) × head size."""

EXPECTED = {
    "llama": llama(kv=4, repeats=1),
    "llama_gqa": llama(),
    "llama_odd": llama(kv=1, repeats=3, size=14, ffn=75, hidden=42),
    "mistral": llama(),
    "qwen2": llama(kv=1, repeats=4),
    "qwen3": llama(size=24),
    "gemma2": llama(norms=("input_layernorm", "pre_feedforward_layernorm"), offset=1.0),
    "phi": phi(),
    "phi3": phi3(),
    "opt": opt(),
    "gpt2": fused("attn", ("c_attn", "c_proj"), ("c_fc", "c_proj"), ("ln_1", "ln_2"), plain(64, start=128), (4, FFN)),
    "gpt_neox": fused("attention", DENSE, H_TO_4H, LAYER_NORMS, HEADS_OF_THREE, (4, FFN)),
    "gpt_neox_sequential": fused("attention", DENSE, H_TO_4H, LAYER_NORMS, HEADS_OF_THREE, (4, FFN)),
    "falcon": fused(
        "self_attention", DENSE, H_TO_4H, ("ln_attn", "ln_mlp"), grouped(2, 2, 16, start=48, stride=64), (2, FFN)
    ),
    "falcon_mqa": falcon_mqa(),
    "falcon_old": fused("self_attention", DENSE, H_TO_4H, LAYER_NORMS, HEADS_OF_THREE, (4, FFN)),
    "bloom": fused("self_attention", DENSE, H_TO_4H, LAYER_NORMS, HEADS_OF_THREE, (4, 4 * HIDDEN)),
    "olmo2": olmo2(),
    "stablelm": llama(),
    "stablelm_parallel": parallel_llama(),
    "cohere": parallel_llama(),
    "mixtral": mixture("block_sparse_moe.experts", ("w1", "w3"), "w2", FFN),
    "qwen3_moe": mixture("mlp.experts", ("gate_proj", "up_proj"), "down_proj", 32),
}


def test_every_family_has_an_expected_map():
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_that_read_the_same_tensor_form_a_group(family):
    assert structure_of(family).groups == tuple(InputGroup(names) for names in EXPECTED[family].groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_and_their_channel_maps_are_found(family):
    folds = {fold.producer: (fold.consumers, fold.channel_map, fold.offset) for fold in structure_of(family).folds}
    assert folds == EXPECTED[family].folds


@pytest.mark.parametrize("family", FAMILIES)
def test_width_groups_are_found(family):
    assert tuple(group.units for group in structure_of(family).width_groups) == EXPECTED[family].units


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_have_the_shapes_of_the_live_modules(family):
    model = tiny_model(family)
    found = map_model(model)
    for block in found.blocks:
        for site in block.structure.sites:
            module = model.get_submodule(block.full(site.name))
            shape = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
            assert (site.outputs, site.inputs) == tuple(shape)
            assert site.transposed == isinstance(module, Conv1D)
            assert site.has_bias == (module.bias is not None)
    assert found.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert map_of(family).tied == found.tied
    assert model.get_submodule(found.embedding) is model.get_input_embeddings()
    assert model.get_submodule(found.head) is model.get_output_embeddings()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_all_folds_together_leave_the_logits_of_a_live_model_as_they_were(family):
    model = tiny_model(family, seed=3)
    tokens = tiny_tokens(family)
    before = model(tokens).logits
    generator = torch.Generator().manual_seed(0)
    for block in map_of(family).blocks:
        module = model.get_submodule(block.name)
        for fold in block.structure.folds:
            producer = module.get_submodule(fold.producer)
            width = len(producer.weight) if fold.producer_is_norm else block.structure.site(fold.producer).outputs
            factors = torch.ones(width)
            read = sorted(set(fold.channel_map))
            factors[read] = torch.rand(len(read), generator=generator) * 3 + 0.25
            apply_fold(module, fold, factors)
    # float32: models compute norms, softmax and grouped experts in it even when their weights are float64
    assert (model(tokens).logits - before).abs().max() < 2e-4 * before.std()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_without_its_rows_is_a_unit_without_its_columns(family):
    tokens = tiny_tokens(family)
    block = map_of(family).blocks[1]
    for group in block.structure.width_groups:
        logits = {}
        for axis in ("rows", "columns"):
            model = tiny_model(family, seed=5)
            for part in group.parts:
                if part.axis == axis:
                    zero(model.get_submodule(block.full(part.site)), list(part.indices[1]), axis)
            logits[axis] = model(tokens).logits
        torch.testing.assert_close(logits["rows"], logits["columns"], rtol=1e-4, atol=1e-5)
        assert (logits["rows"] - tiny_model(family, seed=5)(tokens).logits).abs().max() > 1e-5


def zero(module, indices, axis):
    weight_OI = module.weight.T if isinstance(module, Conv1D) else module.weight
    if axis == "columns":
        weight_OI[:, indices] = 0
        return
    weight_OI[indices] = 0
    if module.bias is not None:
        module.bias[indices] = 0


def test_units_of_grouped_attention_are_kv_groups():
    attention = structure_of("llama_gqa").width_groups[0]
    indices = {part.site: part.indices for part in attention.parts}
    assert indices["self_attn.q_proj"] == (plain(32), plain(32, 32))
    assert indices["self_attn.k_proj"] == indices["self_attn.v_proj"] == (plain(16), plain(16, 16))
    assert indices["self_attn.o_proj"] == (plain(32), plain(32, 32))
    assert [part.axis for part in attention.parts] == ["rows", "rows", "rows", "columns"]


def test_units_of_fused_projections_hold_rows_of_every_part():
    units = {part.site: part.indices for part in structure_of("phi3").width_groups[0].parts}
    first = (*plain(32), *plain(16, 64), *plain(16, 96))  # two query heads, one key head, one value head
    assert units["self_attn.qkv_proj"][0] == first
    ffn = {part.site: part.indices for part in structure_of("phi3").width_groups[1].parts}
    assert ffn["mlp.gate_up_proj"][7] == (7, FFN + 7)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routers_and_expert_banks_are_refused_with_a_reason(family):
    refused = {refusal.name: refusal.reason for refusal in structure_of(family).refused}
    parent = "block_sparse_moe" if family == "mixtral" and EXPERTS_ARE_LINEARS else "mlp"
    assert refused.pop(f"{parent}.gate").startswith("router")
    banks = set() if EXPERTS_ARE_LINEARS else {f"{parent}.experts.gate_up_proj", f"{parent}.experts.down_proj"}
    assert set(refused) == banks
    assert all("3-D" in reason for reason in refused.values())


def test_embedding_and_head_are_refused_and_tying_is_said():
    reasons = {refusal.name: refusal.reason for refusal in map_of("llama_gqa").refused}
    assert set(reasons) == {"model.embed_tokens", "lm_head"}
    assert "tied to model.embed_tokens" in reasons["lm_head"]


def test_linears_outside_the_blocks_are_refused():
    config = tiny_config("opt")
    config.word_embed_proj_dim = 32
    names = {refusal.name for refusal in probe(config).refused}
    assert {"model.decoder.project_in", "model.decoder.project_out"} < names


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("gpt2", Fold("mlp.c_fc", False, ("mlp.c_proj",), plain(FFN))),  # GELU is not homogeneous
        ("llama", Fold("mlp.gate_proj", False, ("mlp.down_proj",), plain(FFN))),
        ("llama", Fold("input_layernorm", True, QKV[:2], plain(HIDDEN))),  # v reads it too
        ("llama_gqa", Fold(QKV[2], False, (O,), grouped(1, 4, 16))),  # wrong channel map
        ("gemma2", Fold("input_layernorm", True, QKV, plain(HIDDEN), 0.0)),  # wrong offset
        ("mixtral", Fold("post_attention_layernorm", True, QKV, plain(HIDDEN))),  # the router reads it
    ],
)
def test_wrong_folds_fail_the_legality_check(family, wrong):
    model = tiny_model(family)
    blocks = find_blocks(model)
    recording = record(model, blocks, tiny_tokens(family))
    experiment = BlockExperiment(blocks[0][1], recording.calls[0], recording.hidden)
    before = copy.deepcopy(experiment.block.state_dict())
    assert not legal(experiment, [wrong])
    assert all(torch.equal(value, before[key]) for key, value in experiment.block.state_dict().items())


class NearlyRelu(torch.nn.Module):
    """Off by about a hundredth of what goes in."""

    def forward(self, x):
        return x.relu() + 0.01 * torch.sin(3 * x)


class EvenOnlyInOctaves(torch.nn.Module):
    """Twice the input gives twice the output; three times the input does not give three times the output."""

    def forward(self, x):
        x = x.relu()
        return x * (1 + 0.1 * torch.sin(2 * torch.pi * x.clamp_min(1e-30).log2()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("activation", "right"), [(torch.nn.ReLU(), True), (NearlyRelu(), False), (EvenOnlyInOctaves(), False)]
)
def test_a_fold_that_is_wrong_by_a_few_per_cent_fails_the_legality_check(activation, right):
    model = tiny_model("opt")
    blocks = find_blocks(model)
    recording = record(model, blocks, tiny_tokens("opt"))
    block = blocks[0][1]
    block.activation_fn = activation
    experiment = BlockExperiment(block, recording.calls[0], recording.hidden)
    assert legal(experiment, [Fold("fc1", False, ("fc2",), plain(FFN))]) == right


@torch.no_grad()
def test_units_that_are_not_separate_fail_the_check():
    model = tiny_model("llama_gqa")
    blocks = find_blocks(model)
    recording = record(model, blocks, tiny_tokens("llama_gqa"))
    experiment = BlockExperiment(blocks[0][1], recording.calls[0], recording.hidden)
    right = structure_of("llama_gqa").width_groups
    assert removable(experiment, right)
    heads = tuple(plain(16, 16 * head) for head in range(4))
    shared_keys = tuple(plain(16, 16 * (head // 2)) for head in range(4))  # two query heads read one key head
    parts = (
        WidthPart(QKV[0], "rows", heads),
        WidthPart(QKV[1], "rows", shared_keys),
        WidthPart(O, "columns", heads),
    )
    assert not removable(experiment, [WidthGroup(4, parts)])
    assert not removable(experiment, [*right[1:], WidthGroup(4, parts)])


def test_different_kinds_of_blocks_are_mapped_separately():
    config = tiny_config("qwen3_moe")
    config.mlp_only_layers = [0]
    dense, sparse = (block.structure for block in probe(config).blocks)
    assert dense.folds[2].producer == "post_attention_layernorm"
    assert not dense.refused
    assert sparse.refused


def test_blocks_of_one_kind_share_one_structure():
    first, *others = map_of("gemma2").blocks
    assert all(block.structure is first.structure for block in others)


def test_probing_leaves_the_config_as_it_was():
    config = tiny_config("llama_gqa")
    before = config.to_dict()
    probe(config)
    assert config.to_dict() == before


def test_the_map_does_not_depend_on_chance():
    assert probe(tiny_config("llama_gqa")) == map_of("llama_gqa")


def test_probing_allocates_neither_embedding_nor_head():
    config = tiny_config("llama")
    config.vocab_size = 4_000_000  # two gigabytes, were they filled
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert probe(config).blocks == map_of("llama").blocks
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_of_the_weightless_model_are_those_of_a_real_one(family):
    real = dict(tiny_model(family).named_buffers())
    for name, buffer in without_weights(tiny_config(family)).named_buffers():
        assert torch.equal(buffer, real[name].to(buffer.dtype)), name


def test_a_model_changed_after_loading_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.other = model.model.layers[1].mlp.__dict__["_modules"].pop("up_proj")
    with pytest.raises(CompressError, match=r"manifest\.unknown-module"):
        map_model(model)


def test_a_config_of_no_causal_language_model_is_refused():
    with pytest.raises(CompressError, match=r"model\.not-causal-lm"):
        probe(AutoConfig.for_model("vit"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_description_is_plain_data_and_says_everything(family):
    found = map_of(family)
    text = json.dumps(describe(found))
    assert json.loads(text) == describe(found)
    for fold in structure_of(family).folds:
        if ".experts." not in fold.producer:
            assert f'"{fold.producer}"' in text
    assert f"0-{len(found.blocks) - 1}" in text


def test_repeated_experts_are_described_once():
    config = tiny_config("llama")
    found = probe(config)
    structure = found.blocks[0].structure
    sites = tuple(replace(structure.sites[0], name=f"mlp.experts.{index}.w1") for index in (0, 1, 2, 5))
    block = replace(found.blocks[0], structure=replace(structure, sites=sites, groups=(), folds=(), width_groups=()))
    (kind,) = describe(replace(found, blocks=(block,)))["kinds"]
    assert [site["name"] for site in kind["sites"]] == ["mlp.experts.{0-2, 5}.w1"]


def test_ranges_are_short():
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0-3, 7, 9-10"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"intermediate_size": 4096, "num_key_value_heads": 8}),
        ("opt", {"ffn_dim": 4096}),
        ("gpt_neox", {"intermediate_size": 4096}),
    ],
)
def test_a_block_of_width_1024_is_mapped_in_under_a_minute(model_type, sizes):
    config = AutoConfig.for_model(
        model_type, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, vocab_size=32000, **sizes
    )
    start = time.perf_counter()
    found = probe(config)
    assert time.perf_counter() - start < 60
    assert found.blocks[0].structure.width_groups[1].units == 4096
