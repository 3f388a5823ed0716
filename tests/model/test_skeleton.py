"""The skeleton records what a plain forward gives each block, and leaves the model as it was."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from llmcompress.errors import CompressError
from llmcompress.model.random_weights import release
from llmcompress.model.skeleton import BlockCall, Recorder, find_blocks, record, recorders
from llmcompress.modules.cache_names import CACHE_NAMES
from tests.families import FAMILIES, tiny_model, tiny_tokens


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_plain_forward(family, attention):
    model = tiny_model(family)
    if attention == "sdpa":
        with suppress(ValueError):  # a family without sdpa runs as it is
            model.set_attn_implementation("sdpa")
    tokens = tiny_tokens(family, batch=2, length=12)
    expected = model.base_model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    blocks = find_blocks(model)
    recording = record(model, blocks, tokens)
    hidden = recording.hidden
    torch.testing.assert_close(hidden, expected[0])
    # the last entry of hidden_states has the final norm applied
    for (_, block), call, after in zip(blocks[:-1], recording.calls[:-1], expected[1:-1], strict=True):
        hidden = call.run(block, hidden)
        torch.testing.assert_close(hidden, after)
    assert recording.calls[-1].run(blocks[-1][1], hidden).shape == hidden.shape


@torch.no_grad()
def test_each_block_gets_its_own_mask():
    model = tiny_model("gemma2")
    calls = record(model, find_blocks(model), tiny_tokens("gemma2", length=12)).calls
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert not torch.equal(masks[0], masks[1])  # sliding and full attention: the window is 5, the sequence 12
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "bloom"])
def test_blocks_are_back_after_an_exception(family):
    model = tiny_model(family)
    blocks = find_blocks(model)
    with pytest.raises(RuntimeError), recorders(model, blocks):
        assert all(isinstance(block, Recorder) for _, block in find_blocks(model))
        raise RuntimeError
    assert [block for _, block in find_blocks(model)] == [block for _, block in blocks]


def test_a_recorder_answers_for_its_block():
    block = nn.Linear(2, 3)
    block.attention_type = "full_attention"
    recorder = recorder_of(block)
    assert recorder.attention_type == "full_attention"
    assert recorder.in_features == 2
    with pytest.raises(AttributeError):
        _ = recorder.nothing_of_that_name
    assert not list(recorder.parameters())


def recorder_of(block):
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    with recorders(model, [("layers.0", block)]) as standing:
        return standing[0]


def test_a_model_without_blocks_is_refused_with_a_reason():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:-1])
    with pytest.raises(CompressError, match=r"model\.no-blocks"):
        find_blocks(model)


@pytest.mark.parametrize("family", ["llama", "falcon", "bloom"])
def test_blocks_whose_weights_are_not_loaded_can_be_recorded(family):
    model, tokens = tiny_model(family), tiny_tokens(family)
    expected = record(model, find_blocks(model), tokens)
    for _, block in find_blocks(model):
        release(block)
    found = record(model, find_blocks(model), tokens)
    assert torch.equal(found.hidden, expected.hidden)
    assert len(found.calls) == len(expected.calls)
    assert all(parameter.is_meta for _, block in find_blocks(model) for parameter in block.parameters())


class Branches(nn.Module):
    """Hands its blocks several hidden states at once, as Gemma 3n does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, use_cache):
        return self.layers[0](torch.zeros(2, *input_ids.shape, 4))


def test_a_model_with_several_hidden_states_is_refused():
    model = Branches()
    with pytest.raises(CompressError, match=r"model\.other-blocks"):
        record(model, [("layers.0", model.layers[0])], torch.zeros(1, 3, dtype=torch.long))
    assert isinstance(model.layers[0], nn.Linear)


def test_calls_hold_no_cache():
    model = tiny_model("llama")
    for call in record(model, find_blocks(model), tiny_tokens("llama")).calls:
        assert all(call.kwargs.get(name) is None for name in CACHE_NAMES)
        assert not call.kwargs.get("use_cache")


def test_tensors_of_a_call_can_be_changed_together():
    call = BlockCall((torch.ones(1), [torch.ones(2)]), {"pair": (torch.ones(3), None), "name": "x"})
    halves = call.with_tensors(torch.Tensor.half)
    assert halves.args[0].dtype == halves.args[1][0].dtype == halves.kwargs["pair"][0].dtype == torch.float16
    assert halves.kwargs["pair"][1] is None
    assert halves.kwargs["name"] == "x"


@torch.no_grad()
def test_hooks_inside_a_block_do_not_hear_a_recording():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    heard = []
    handles = [
        module.register_forward_hook(lambda *_: heard.append("after")) for module in list(blocks[0][1].modules())[1:]
    ] + [
        module.register_forward_pre_hook(lambda *_: heard.append("before"))
        for module in list(blocks[0][1].modules())[1:]
    ]
    recording = record(model, blocks, tiny_tokens("llama", batch=2, length=12))
    assert not heard
    recording.calls[0].run(blocks[0][1], recording.hidden)
    assert heard.count("before") == heard.count("after") > 0
    for handle in handles:
        handle.remove()
