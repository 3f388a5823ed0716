"""A block without some units computes what the block with those units masked computes, in every family."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import CompressError
from llmcompress.model.map import SiteInfo
from llmcompress.model.probe import probe
from llmcompress.model.shrink import can_shrink, kind_of, shrink_block
from llmcompress.model.skeleton import find_blocks, record
from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from tests.families import FAMILIES, tiny_config, tiny_model, tiny_tokens

ALIBI = {"bloom", "falcon_old"}
"""The model hands these blocks one slope per head: heads cannot go."""


@functools.cache
def map_of(family):
    return probe(tiny_config(family))


def groups_of(family, kind):
    structure = map_of(family).blocks[0].structure
    return {i: group for i, group in enumerate(structure.width_groups) if kind_of(group) == kind}


WITH_CHANNELS = [family for family in FAMILIES if groups_of(family, "channels")]
WITH_HEADS = [family for family in FAMILIES if family not in ALIBI and groups_of(family, "heads")]


def masked_model(family, keep):
    """Zero the columns that would have read the removed units, in all blocks: slow and obviously right."""
    model = tiny_model(family)
    for block in map_of(family).blocks:
        for index, units in keep.items():
            group = block.structure.width_groups[index]
            for part in group.parts:
                module = model.get_submodule(block.full(part.site))
                for unit in set(range(group.units)) - set(units):
                    if part.axis == "columns":
                        weight_OI = module.weight.T if isinstance(module, Conv1D) else module.weight
                        weight_OI[:, list(part.indices[unit])] = 0
    return model


def shrunk_model(family, *keeps):
    """All blocks shrunk by one keep after the other; also the structures afterwards."""
    model = tiny_model(family)
    named = find_blocks(model)
    recording = record(model, named, tiny_tokens(family, batch=1, length=8))
    structures = []
    for info, (_, block), call in zip(map_of(family).blocks, named, recording.calls, strict=True):
        structure = info.structure
        for keep in keeps:
            structure = shrink_block(block, structure, keep, run=functools.partial(call.run, block, recording.hidden))
        structures.append(structure)
    return model, structures


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def closed_form(family, keep):
    """Parameters that go: per removed unit its rows (each with its bias) and its columns, counted once."""
    gone = 0
    for block in map_of(family).blocks:
        for site in block.structure.sites:
            rows, columns = set(), set()
            for index, units in keep.items():
                for part in block.structure.width_groups[index].parts:
                    if part.site == site.name:
                        chosen = rows if part.axis == "rows" else columns
                        chosen |= {i for unit, owned in enumerate(part.indices) if unit not in units for i in owned}
            left = (site.outputs - len(rows)) * (site.inputs - len(columns))
            gone += site.outputs * site.inputs - left + (len(rows) if site.has_bias else 0)
    return gone


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_CHANNELS)
def test_without_some_channels_a_model_computes_what_the_masked_one_does(family):
    keep = {i: range(1, group.units, 2) for i, group in groups_of(family, "channels").items()}
    tokens = tiny_tokens(family)
    model, _ = shrunk_model(family, keep)
    torch.testing.assert_close(model(tokens).logits, masked_model(family, keep)(tokens).logits, rtol=1e-4, atol=2e-5)
    assert parameters(tiny_model(family)) - parameters(model) == closed_form(family, keep) > 0


def test_most_families_can_lose_heads_and_channels():
    assert len(WITH_HEADS) >= 16
    assert len(WITH_CHANNELS) >= 20


SWITCHED = [(family, "sdpa") for family in WITH_HEADS if tiny_model(family)._supports_sdpa]
"""Attention is chosen anew after the heads are gone, as a user may do."""


@torch.no_grad()
@pytest.mark.parametrize(("family", "attention"), [(family, "eager") for family in WITH_HEADS] + SWITCHED)
def test_without_some_heads_a_model_computes_what_the_masked_one_does_also_with_a_cache(family, attention):
    keep = {i: range(1, group.units) for i, group in groups_of(family, "heads").items()}
    tokens = tiny_tokens(family)
    model, _ = shrunk_model(family, keep)
    masked = masked_model(family, keep)
    if attention != "eager":
        model.set_attn_implementation(attention)
        masked.set_attn_implementation(attention)
    torch.testing.assert_close(model(tokens).logits, masked(tokens).logits, rtol=1e-4, atol=2e-5)
    first = model(tokens[:, :7], use_cache=True)
    second = model(tokens[:, 7:], **with_cache(model.forward, cache_of(first)), use_cache=True)
    stitched = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(stitched, masked(tokens).logits, rtol=1e-4, atol=2e-5)
    assert parameters(tiny_model(family)) - parameters(model) == closed_form(family, keep) > 0


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_HEADS)
def test_blocks_with_different_numbers_of_heads_are_built_again_from_a_manifest(family):
    live, _ = shrunk_model(family, {0: range(1, groups_of(family, "heads")[0].units)})
    first, blocks = find_blocks(tiny_model(family))[0], find_blocks(live)
    live.get_submodule(blocks[0][0].rpartition(".")[0])[0] = first[1]  # this block keeps all its heads
    manifest = changes(live, tiny_model(family))
    again = tiny_model(family)
    apply_manifest(again, Manifest.from_json(json.loads(json.dumps(manifest.to_json()))), torch.float32)
    again.load_state_dict(live.state_dict())
    tokens = tiny_tokens(family)
    torch.testing.assert_close(again(tokens).logits, live(tokens).logits, rtol=1e-4, atol=2e-5)
    assert {name.split(".")[-1] for owned in manifest.attributes.values() for name in owned}.isdisjoint({"layer_idx"})


@pytest.mark.parametrize("family", sorted(ALIBI))
def test_heads_that_the_model_itself_counts_are_refused_and_the_block_stays(family):
    (index,) = groups_of(family, "heads")
    before = tiny_model(family).state_dict()
    model = tiny_model(family)
    named = find_blocks(model)
    recording = record(model, named, tiny_tokens(family, batch=1, length=8))
    block = named[0][1]
    integers = attributes(block)
    with pytest.raises(CompressError, match=r"shrink\.needs-all-heads"):
        shrink_block(
            block,
            map_of(family).blocks[0].structure,
            {index: [0, 2]},
            run=functools.partial(recording.calls[0].run, block, recording.hidden),
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert attributes(block) == integers


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3", "gpt2", "falcon", *sorted(ALIBI)])
def test_whether_heads_can_go_is_known_from_the_map_and_asking_changes_nothing(family):
    (index,) = groups_of(family, "heads")
    structure = map_of(family).blocks[0].structure
    assert structure.width_groups[index].fixed == (family in ALIBI)
    model = tiny_model(family)
    named = find_blocks(model)
    recording = record(model, named, tiny_tokens(family, batch=1, length=8))
    block, run = named[0][1], functools.partial(recording.calls[0].run, named[0][1], recording.hidden)
    parameters, configs, integers = dict(block.named_parameters()), configs_of(block), attributes(block)
    expected = run()
    assert can_shrink(block, structure, {index: [0]}, run=run) == (family not in ALIBI)
    assert all(parameter is parameters[name] for name, parameter in block.named_parameters())
    assert configs_of(block) == configs and attributes(block) == integers and torch.equal(run(), expected)


def configs_of(block):
    return {name: id(vars(module)["config"]) for name, module in block.named_modules() if "config" in vars(module)}


def attributes(block):
    return {
        (name, key): value
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int)
    }


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "falcon"])
def test_shrinking_twice_is_shrinking_once_by_both(family):
    heads, channels = groups_of(family, "heads"), groups_of(family, "channels")
    (head,), (channel,) = heads, channels
    tokens = tiny_tokens(family)
    units = heads[head].units
    once = {head: [units - 1], channel: [3, 5, 8, 40]}
    model, structures = shrunk_model(family, {channel: [3, 4, 5, 8, 40]}, {head: [units - 1]}, {channel: [0, 2, 3, 4]})
    torch.testing.assert_close(model(tokens).logits, shrunk_model(family, once)[0](tokens).logits, rtol=1e-4, atol=2e-5)
    assert structures == shrunk_model(family, once)[1]


@pytest.mark.parametrize("family", ["llama_gqa", "phi3", "gpt2", "gpt_neox", "qwen3"])
def test_the_structure_afterwards_describes_the_smaller_block(family):
    heads, channels = groups_of(family, "heads"), groups_of(family, "channels")
    keep = {i: range(g.units - 1) for i, g in heads.items()} | {i: range(0, g.units, 3) for i, g in channels.items()}
    model, structures = shrunk_model(family, keep)
    for structure, (_, block) in zip(structures, find_blocks(model), strict=True):
        for site in structure.sites:
            module = block.get_submodule(site.name)
            rows, columns = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
            noted = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
            assert (site.outputs, site.inputs) == (rows, columns) == noted
            assert site == SiteInfo(site.name, rows, columns, module.bias is not None, isinstance(module, Conv1D))
        for fold in structure.folds:
            assert len(fold.channel_map) == structure.site(fold.consumers[0]).inputs
            if not fold.producer_is_norm:
                assert max(fold.channel_map) < structure.site(fold.producer).outputs
        for group in structure.width_groups:
            for part in group.parts:
                limit = getattr(structure.site(part.site), "outputs" if part.axis == "rows" else "inputs")
                assert len(part.indices) == group.units
                assert all(0 <= index < limit for indices in part.indices for index in indices)


def test_the_structure_of_a_smaller_ffn_is_that_of_a_model_built_with_it():
    config = tiny_config("llama_gqa")
    config.intermediate_size = 48
    _, structures = shrunk_model("llama_gqa", {1: range(0, 96, 2)})
    assert structures[0] == probe(config).blocks[0].structure


def test_keeping_everything_changes_nothing():
    model, structures = shrunk_model("llama", {0: range(4), 1: range(96)})
    assert structures[0] is map_of("llama").blocks[0].structure
    before = tiny_model("llama").state_dict()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [{0: []}, {0: [4]}, {2: [0]}, {0: [-1]}])
def test_units_that_do_not_exist_and_empty_choices_are_refused(keep):
    block = find_blocks(tiny_model("llama"))[0][1]
    with pytest.raises(ValueError, match="width group"):
        shrink_block(block, map_of("llama").blocks[0].structure, keep, run=None)


def test_without_a_way_to_run_the_block_only_channels_go():
    block = find_blocks(tiny_model("llama"))[0][1]
    structure = map_of("llama").blocks[0].structure
    assert shrink_block(block, structure, {1: [0, 1]}, run=None).site("mlp.down_proj").inputs == 2
    with pytest.raises(CompressError, match=r"shrink\.unverified"):
        shrink_block(block, structure, {0: [0]}, run=None)


def test_a_site_that_holds_something_else_is_refused():
    block = find_blocks(tiny_model("llama"))[0][1]
    block.mlp.up_proj = nn.Identity()
    with pytest.raises(CompressError, match=r"shrink\.compressed-site"):
        shrink_block(block, map_of("llama").blocks[0].structure, {1: [0, 1]}, run=None)


def test_half_precision_blocks_shrink_too():
    model = tiny_model("opt", dtype=torch.bfloat16)
    named = find_blocks(model)
    recording = record(model, named, tiny_tokens("opt", batch=1, length=8))
    block = named[1][1]
    run = functools.partial(recording.calls[1].run, block, recording.hidden)
    shrink_block(block, map_of("opt").blocks[1].structure, {0: [1, 2]}, run=run)
    assert block.self_attn.num_heads == 2
    assert block.self_attn.q_proj.out_features == 32
    assert block.self_attn.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("apart", "refused"), [(1e-6, False), (0.05, True)])
def test_a_smaller_block_that_is_wrong_by_a_few_per_cent_is_refused(apart, refused):
    """An FFN that gives other outputs because of its width."""
    model = tiny_model("llama")
    named = find_blocks(model)
    recording = record(model, named, tiny_tokens("llama", batch=1, length=8))
    block, structure = named[0][1], map_of("llama").blocks[0].structure
    block.mlp.register_forward_hook(lambda mlp, _, out: out * (1 + apart * (mlp.down_proj.in_features < 96)))
    run = functools.partial(recording.calls[0].run, block, recording.hidden)
    if not refused:
        assert shrink_block(block, structure, {1: range(48)}, run=run).site("mlp.down_proj").inputs == 48
        return
    with pytest.raises(CompressError, match=r"shrink\.not-separable"):
        shrink_block(block, structure, {1: range(48)}, run=run)
    assert block.mlp.down_proj.in_features == 96


def test_a_block_that_already_has_a_private_config_is_shrunk_again():
    model, _ = shrunk_model("phi3", {1: range(48)}, {0: [1]})
    assert model.model.layers[0].self_attn.o_proj.in_features == 32
    wide = tiny_config("phi3")
    wide.num_key_value_heads = 4
    model = AutoModelForCausalLM.from_config(wide, attn_implementation="eager").eval()
    named, structure = find_blocks(model), probe(wide).blocks[0].structure
    recording = record(model, named, tiny_tokens("phi3", batch=1, length=8))
    run = functools.partial(recording.calls[0].run, named[0][1], recording.hidden)
    once = shrink_block(named[0][1], structure, {0: [0, 2, 3]}, run=run)
    twice = shrink_block(named[0][1], once, {0: [1, 2]}, run=run)
    assert twice.width_groups[0].units == 2
    assert model.config.num_attention_heads == 4


def test_the_models_own_config_stays_when_a_block_gets_a_private_one():
    model, _ = shrunk_model("phi3", {0: [1]})
    assert model.config.num_attention_heads == 4
