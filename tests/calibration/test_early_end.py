"""Measuring runs a block no further than the last input that is read, and reads the same as a whole forward shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream, BlockWork
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.probe import map_model
from llmcompress.numerics.statistics import Gram
from tests.families import FAMILIES, tiny_model, tiny_tokens


def first_block(family: str) -> BlockWork:
    model = tiny_model(family, seed=1)
    unfuse_experts(model)
    windows = tiny_tokens(family, batch=5, length=12, seed=3)
    return next(iter(BlockStream(model, map_model(model), RunContext(windows, batch=2))))


@contextmanager
def runs_of(module: nn.Module) -> Iterator[list[int]]:
    """Grows by one whenever the module has run to its end."""
    runs: list[int] = []
    handle = module.register_forward_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        handle.remove()


def whole_forwards(block: BlockWork, names: list[str]) -> dict[str, Tensor]:
    """Sums of squared inputs, seen by hooks of our own while the block runs in full."""
    squares = {name: torch.zeros(()) for name in names}

    def add(name: str, args: tuple[Tensor, ...]) -> None:
        squares[name] = squares[name] + args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)

    handles = [
        block.module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args))
        for name in names
    ]
    block.outputs()
    for handle in handles:
        handle.remove()
    return squares


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_whole_forwards(family: str) -> None:
    block = first_block(family)
    expected = whole_forwards(block, [site.info.name for site in block.sites])
    block.measure(block.sites, (Gram,))
    for site in block.sites:
        gram = site.statistic(Gram)
        if gram.tokens:
            torch.testing.assert_close(gram.sum_II.diagonal().double(), expected[site.info.name], rtol=1e-4, atol=1e-5)


def test_nothing_behind_the_last_input_runs() -> None:
    block = first_block("llama_gqa")
    down, output = block.site("mlp.down_proj").module, block.site("self_attn.o_proj").module
    with runs_of(down) as downs, runs_of(output) as outputs:
        block.measure(block.sites, (Gram,))
    assert (len(downs), len(outputs)) == (0, 3)
    with runs_of(output) as outputs:
        block.measure([block.site("self_attn.q_proj")], (Gram,))
    assert len(outputs) == 0
    with runs_of(down) as downs:
        block.outputs()
    assert len(downs) == 3  # nothing is left of the hooks


def test_a_linear_that_is_given_the_tokens_in_parts_sees_all_of_them() -> None:
    class InParts(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.inner(part) for part in x.split(4, dim=1)], 1)

    block = first_block("llama_gqa")
    mlp = block.module.mlp
    block.module.mlp = InParts(mlp)
    for name, linear in mlp.named_children():
        block.module.mlp.add_module(name, linear)  # sites keep their names
    block.measure(block.sites, (Gram,))
    assert {site.statistic(Gram).tokens for site in block.sites} == {5 * 12}


def test_experts_keep_every_forward_whole() -> None:
    block = first_block("mixtral")
    experts = [site for site in block.sites if "experts" in site.info.name.split(".")]
    with runs_of(block.module) as runs:
        block.measure(experts, (Gram,))
    assert len(runs) == 3
