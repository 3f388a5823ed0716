"""Linears with rows or columns left out: what they compute, the matrix they stand for, how they are built again."""

import json

import pytest
import torch
from torch import Tensor, nn

from llmcompress.modules.base import CompressedModule, from_named_spec, named_spec
from llmcompress.modules.selected import SelectedColumns, SelectedRows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MODULES: dict[str, CompressedModule] = {
    "rows": SelectedRows.from_rows(random(3, 10), None, rows=[4, 0, 5], outputs=6),
    "rows, bias": SelectedRows.from_rows(random(3, 10), random(3, seed=1), rows=[1, 2, 5], outputs=6),
    "columns": SelectedColumns.from_columns(random(6, 4), None, columns=[9, 1, 2, 7], inputs=10),
    "columns, bias": SelectedColumns.from_columns(random(6, 1), random(6, seed=1), columns=[3], inputs=10),
}


@pytest.fixture(params=MODULES)
def module(request) -> CompressedModule:
    return MODULES[request.param]


def test_it_computes_what_the_matrix_it_stands_for_computes(module: CompressedModule) -> None:
    x = random(2, 5, 10, seed=3)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.dense_weight(), module.bias))
    assert module.dense_weight().shape == (module.out_features, module.in_features) == (6, 10)


def test_rows_left_out_are_exactly_zero_and_columns_left_out_are_not_read() -> None:
    out = MODULES["rows, bias"](random(4, 10))
    assert out[:, [0, 3, 4]].eq(0).all() and out[:, [1, 2, 5]].ne(0).all()
    x = random(4, 10)
    changed = x.clone()
    changed[:, [0, 3, 4, 5, 6, 8]] = float("nan")
    assert torch.equal(MODULES["columns"](x), MODULES["columns"](changed))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_spec_and_state_make_it_again(module: CompressedModule, device: str) -> None:
    spec = json.loads(json.dumps(named_spec(module)))
    with torch.device(device):
        again = from_named_spec(spec, torch.float32)
    again.load_state_dict(module.state_dict(), strict=True, assign=True)
    x = random(4, 10)
    assert torch.equal(again(x), module(x))
    assert named_spec(again) == spec


def test_a_stock_loader_finds_an_empty_weight(module: CompressedModule) -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(10, 6).load_state_dict(module.state_dict(), strict=False)


def test_only_what_is_kept_are_parameters() -> None:
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in MODULES.items()}
    assert counts == {"rows": 30, "rows, bias": 33, "columns": 24, "columns, bias": 12}


def test_gradients_reach_what_is_kept(module: CompressedModule) -> None:
    x = random(3, 10).requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in module.parameters())
