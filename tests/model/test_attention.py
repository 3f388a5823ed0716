"""Heads, shared keys and rotary pairs found by experiment, on every family, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from llmcompress.model.attention import Attention, find_attentions
from llmcompress.model.probe import map_model
from llmcompress.model.skeleton import find_blocks, record
from tests.families import FAMILIES, tiny_model, tiny_tokens

NORMED = {"qwen3", "qwen3_moe", "olmo2"}
"""A norm over the queries and keys of a head, or of all heads."""
SINGLE = {"opt", "gpt2", "falcon_old", "bloom"}
"""No rotary positions: every row goes alone."""


@pytest.fixture(scope="module", params=FAMILIES)
def found(request) -> tuple[str, nn.Module, Attention]:
    model = tiny_model(request.param, seed=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attentions = find_attentions(model, 0, map_model(model).blocks[0].structure)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(attentions) == 1
    return request.param, model, attentions[0]


def test_heads_and_their_width_are_those_of_the_config(found: tuple[str, nn.Module, Attention]) -> None:
    _, model, attention = found
    config = model.config
    heads = config.num_attention_heads
    reader = model.get_submodule(f"{find_blocks(model)[0][0]}.{attention.reader}")
    columns = [column for group in attention.groups for head in group.heads for column in head]
    assert sum(len(group.heads) for group in attention.groups) == heads
    assert sorted(columns) == list(range(len(columns)))
    assert len(columns) == min(reader.weight.shape) or len(columns) in reader.weight.shape
    assert all(len(group.values) * heads == len(columns) for group in attention.groups)
    assert attention.averages


def test_rotary_pairs_go_together_and_single_rows_alone(found: tuple[str, nn.Module, Attention]) -> None:
    family, _, attention = found
    for group in attention.groups:
        if family in NORMED:
            assert len(group.atoms) == 1
            continue
        sizes = {len(atom.keys) for atom in group.atoms}
        assert sizes == {1} if family in SINGLE else 2 in sizes and sizes <= {1, 2}
        assert sum(len(atom.keys) for atom in group.atoms) == len(group.values)
        assert all(len(rows) == len(atom.keys) for atom in group.atoms for rows in atom.queries)


def test_an_atoms_queries_meet_its_own_keys_and_no_others(found: tuple[str, nn.Module, Attention]) -> None:
    """So with the keys silent the queries have no say, and the other way round."""
    family, model, attention = found
    if family in NORMED:
        return
    for number in (0, -1):
        keys = [row for group in attention.groups for row in group.atoms[number].keys]
        queries = [row for group in attention.groups for rows in group.atoms[number].queries for row in rows]
        plain, no_keys, no_queries, neither = (
            output(model, attention, silent) for silent in ([], keys, queries, keys + queries)
        )
        torch.testing.assert_close(no_keys, neither, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(no_queries, neither, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(plain, neither, atol=1e-3)


def test_values_of_a_group_can_be_turned_and_turned_back(found: tuple[str, nn.Module, Attention]) -> None:
    _, model, attention = found
    before = output(model, attention, [])
    width = len(attention.groups[0].values)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    after = output(model, attention, [], turn)
    torch.testing.assert_close(after, before, atol=5e-5, rtol=1e-3)


def test_it_survives_as_text(found: tuple[str, nn.Module, Attention]) -> None:
    assert Attention.from_json(found[2].to_json()) == found[2]


@torch.no_grad()
def output(model: nn.Module, attention: Attention, silent: list[int], turn: Tensor | None = None) -> Tensor:
    """The first block's output with some projection rows silent, or all values turned and turned back."""
    blocks = find_blocks(model)
    block = blocks[0][1]
    ids = tiny_tokens("llama", batch=2, length=9)
    recording = record(model, blocks, ids)
    hidden = torch.randn(recording.hidden.shape, generator=torch.Generator().manual_seed(2))
    with changed(block, attention, silent, turn):
        return recording.calls[0].run(block, hidden)


@contextmanager
def changed(block: nn.Module, attention: Attention, silent: list[int], turn: Tensor | None) -> Iterator[None]:
    channels, handles = attention.channels, []

    def project(name: str):
        def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
            out = out.clone()
            start = channels.start(name)
            width = dict(attention.taps)[name]
            out[..., [row - start for row in silent if start <= row < start + width]] = 0
            if turn is not None:
                for group in attention.groups:
                    rows = [row - start for row in group.values if start <= row < start + width]
                    if rows:
                        out[..., rows] = out[..., rows] @ turn.T
            return out

        return hook

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if turn is None:
            return None
        x = args[0].clone()
        for group in attention.groups:
            for head in group.heads:
                x[..., list(head)] = x[..., list(head)] @ turn
        return (x, *args[1:])

    for name, _ in attention.taps:
        handles.append(block.get_submodule(name).register_forward_hook(project(name)))
    handles.append(block.get_submodule(attention.reader).register_forward_pre_hook(read))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
