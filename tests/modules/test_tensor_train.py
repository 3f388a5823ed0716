"""Tensor-train and Tucker modules: what they compute, the matrix they stand for, how they are built again."""

import json

import pytest
import torch
from torch import Tensor, nn

from llmcompress.modules.base import CompressedModule, from_named_spec, named_spec
from llmcompress.modules.tensor_train import TensorTrainEmbedding, TensorTrainHead, TensorTrainLinear
from llmcompress.modules.tucker import TuckerLinear


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cores(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def tucker(split: str, *, bias: bool = False) -> TuckerLinear:
    outputs = 12 if split == "rows" else 10
    return TuckerLinear(
        random(2, 3, 4),
        random(3, 2, seed=1),
        random(4, 3, seed=2),
        random(10, 4, seed=3),
        random(outputs, seed=4) if bias else None,
        split=split,
    )


LINEARS: dict[str, CompressedModule] = {
    "thin train": TensorTrainLinear(cores((1, 3, 5, 1), (1, 4, 2, 1)), None),
    "train, bias": TensorTrainLinear(cores((1, 3, 5, 2), (2, 4, 2, 1)), random(12, seed=9)),
    "fat train": TensorTrainLinear(cores((1, 3, 5, 15), (15, 4, 2, 1)), None),
    "three cores": TensorTrainLinear(cores((1, 2, 5, 2), (2, 3, 1, 3), (3, 2, 2, 1)), None),
    "head": TensorTrainHead(cores((12, 1, 5, 2), (12, 2, 2, 1)), None),
    "head, bias": TensorTrainHead(cores((12, 1, 5, 1), (12, 1, 2, 1)), random(12, seed=9)),
    "tucker rows": tucker("rows"),
    "tucker rows, bias": tucker("rows", bias=True),
}
EMBEDDING = TensorTrainEmbedding(cores((12, 1, 5, 2), (12, 2, 2, 1)), scale=3.0)
ALL = {**LINEARS, "tucker columns": tucker("columns", bias=True), "embedding": EMBEDDING}


@pytest.fixture(params=LINEARS)
def linear(request) -> CompressedModule:
    return LINEARS[request.param]


@pytest.fixture(params=ALL)
def module(request) -> CompressedModule:
    return ALL[request.param]


@pytest.mark.parametrize("shape", [(10,), (1, 10), (2, 5, 10), (300, 10), (0, 10)])
def test_it_computes_what_the_matrix_it_stands_for_computes(linear: CompressedModule, shape: tuple[int, ...]) -> None:
    x = random(*shape, seed=3)
    expected = nn.functional.linear(x, linear.dense_weight(), linear.bias)
    torch.testing.assert_close(linear(x), expected, atol=1e-4, rtol=1e-4)
    assert linear.dense_weight().shape == (linear.out_features, linear.in_features) == (12, 10)


def test_one_that_reads_the_heads_does_too() -> None:
    reader, x = ALL["tucker columns"], random(2, 5, 12)
    expected = nn.functional.linear(x, reader.dense_weight(), reader.bias)
    torch.testing.assert_close(reader(x), expected, atol=1e-4, rtol=1e-4)
    assert reader.dense_weight().shape == (reader.out_features, reader.in_features) == (10, 12)


def test_contracting_core_by_core_equals_the_matrix_and_thin_trains_do_it() -> None:
    for name in ("thin train", "three cores", "fat train"):
        train, x = LINEARS[name], random(4, 10)
        assert isinstance(train, TensorTrainLinear)
        torch.testing.assert_close(train._contracted(x), x @ train.dense_weight().T, atol=1e-4, rtol=1e-4)
    thin, fat = LINEARS["thin train"], LINEARS["fat train"]
    assert isinstance(thin, TensorTrainLinear) and isinstance(fat, TensorTrainLinear)
    assert thin._steps() < thin.out_features * thin.in_features < fat._steps()


def test_an_embedding_looks_up_the_rows_of_its_matrix_times_its_scale() -> None:
    ids = torch.tensor([[3, 0, 11], [5, 5, 2]])
    torch.testing.assert_close(EMBEDDING(ids), 3.0 * EMBEDDING.dense_weight()[ids])
    assert EMBEDDING.dense_weight().shape == (EMBEDDING.num_embeddings, EMBEDDING.embedding_dim) == (12, 10)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_spec_and_state_make_it_again(module: CompressedModule, device: str) -> None:
    spec = json.loads(json.dumps(named_spec(module)))
    with torch.device(device):
        again = from_named_spec(spec, torch.float32)
    again.load_state_dict(module.state_dict(), strict=True, assign=True)
    assert torch.equal(again.dense_weight(), module.dense_weight())
    assert named_spec(again) == spec


def test_a_stock_loader_finds_an_empty_weight(module: CompressedModule) -> None:
    stock = nn.Embedding(12, 10) if module is EMBEDDING else nn.Linear(module.in_features, module.out_features)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        stock.load_state_dict(module.state_dict(), strict=False)


def test_the_dense_weight_has_the_dtype_of_the_parameters(module: CompressedModule) -> None:
    spec = named_spec(module)
    assert from_named_spec(spec, torch.bfloat16).dense_weight().dtype == torch.bfloat16
