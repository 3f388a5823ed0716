"""Tensor trains, Tucker heads and TensorGPT: their guarantees on tiny random models."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from llmcompress.modules.tensor_train import TensorTrainEmbedding, TensorTrainHead, TensorTrainLinear
from llmcompress.modules.tucker import TuckerLinear
from llmcompress.numerics.tensor_train import balanced_factors, decompose, full_ranks
from llmcompress.passes.base import PASSES
from tests.families import FAMILIES, tiny_model
from tests.passes.decomposition.factored import block_pass, compressed, map_of, windows

SOME = ("llama_gqa", "qwen2", "gpt2", "opt", "llama_odd")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(windows(seed=9, count=2)).logits.double()


def parameters(model: nn.Module) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def reloaded(model: Any) -> Any:
    again = type(model)(copy.deepcopy(model.config)).eval()
    apply_manifest(again, Manifest.from_json(json.loads(json.dumps(changes(model, again).to_json()))), torch.float32)
    again.load_state_dict(model.state_dict(), strict=True)
    return again


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("eps", [0.1, 0.5])
@pytest.mark.parametrize("ways", [2, 3])
def test_a_tensor_train_stays_within_its_tolerance(family: str, eps: float, ways: int) -> None:
    dense = tiny_model(family, seed=1)
    model, rows = compressed(family, block_pass("tensor_train", eps=eps, ways=ways))
    for row in rows:
        module = model.get_submodule(row.site)
        if row.degraded:
            assert not isinstance(module, TensorTrainLinear)
            continue
        weight = dense.get_submodule(row.site).weight.detach()
        weight = weight.T if "Conv1D" in type(dense.get_submodule(row.site)).__name__ else weight
        assert float((module.dense_weight() - weight).norm()) <= eps * float(weight.norm()) * 1.0001
        assert (row.score or 0) <= eps**2 * 1.001
        assert row.parameters == sum(core.numel() for core in module.cores) < weight.numel()


@pytest.mark.parametrize("name", ["tensor_train", "tucker"])
@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_ratios_are_kept_and_it_reloads(name: str, fraction: float) -> None:
    model, rows = compressed("llama_gqa", block_pass(name, fraction=fraction))
    dense = tiny_model("llama_gqa")
    kind = TensorTrainLinear if name == "tensor_train" else TuckerLinear
    assert rows and all(isinstance(model.get_submodule(row.site), kind) for row in rows)
    for row in rows:
        assert (row.parameters or 0) <= (1 - fraction) * dense.get_submodule(row.site).weight.numel()
    assert torch.equal(logits(reloaded(model)), logits(model))
    assert (logits(model) - logits(tiny_model("llama_gqa", seed=1))).abs().max() > 0


def test_less_removed_loses_less() -> None:
    for name in ("tensor_train", "tucker"):
        lost = [
            sum(row.score or 0 for row in compressed("llama", block_pass(name, fraction=fraction))[1])
            for fraction in (0.1, 0.4, 0.7)
        ]
        assert lost == sorted(lost) and lost[0] < lost[-1]


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "opt", "gpt_neox", "falcon", "bloom"])
def test_tucker_works_on_linears_of_heads_only_with_their_biases(family: str) -> None:
    model, rows = compressed(family, block_pass("tucker", fraction=0.1))
    touched = {row.site.split(".")[-1] for row in rows if not row.degraded}
    assert touched and not any("mlp" in row.site or "fc" in row.site for row in rows)
    assert torch.isfinite(logits(model)).all()


def test_tucker_leaves_heads_that_are_scattered_and_refuses_a_model_without_any() -> None:
    _, rows = compressed("gpt2", block_pass("tucker"))
    assert any("not contiguous" in (row.degraded or "") for row in rows)
    with pytest.raises(CompressError, match="no selected site consists of several heads"):
        compressed("qwen2", block_pass("tucker"))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_embedding_is_exact(family: str) -> None:
    """The pass would leave it dense, as its trains are then not smaller; so the module is put in by hand."""
    model = tiny_model(family, seed=1)
    dense = logits(model)
    embedding = model.get_input_embeddings()
    table = embedding.weight.detach().double()
    axes = balanced_factors(table.shape[1], 3)
    cores = [core.float() for core in decompose(table, axes, full_ranks(axes))]
    scale = float(embedding(torch.tensor([5])).norm() / embedding.weight[5].norm())
    train = TensorTrainEmbedding(cores, round(scale, 4))
    torch.testing.assert_close(train.dense_weight(), embedding.weight, atol=1e-5, rtol=0)
    model.set_input_embeddings(train)
    torch.testing.assert_close(logits(model), dense, atol=1e-3 * float(dense.abs().max()), rtol=0)


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "gpt2", "opt", "gemma2", "llama_odd"])
@pytest.mark.parametrize("options", [{"rank": 2}, {"fraction": 0.5, "ways": 3}, {"eps": 0.9}])
def test_an_embedding_of_tensor_trains_counts_its_parameters_honestly(family: str, options: dict[str, Any]) -> None:
    dense = tiny_model(family, seed=1)
    tied = map_of(family).tied
    model, rows = compressed(family, PASSES["tensorgpt"](**options))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, TensorTrainEmbedding)
    assert rows[0].parameters == sum(core.numel() for core in embedding.cores)
    table = dense.get_input_embeddings().weight
    extra = table.numel() if tied else 0
    assert parameters(model) == parameters(dense) - table.numel() + (rows[0].parameters or 0) + extra
    assert model.config.tie_word_embeddings is False or not tied
    assert len(rows) == 1 + tied and all("parameters to the model" in (row.degraded or "") for row in rows[1:])
    assert torch.equal(logits(reloaded(model)), logits(model))
    assert rows[0].score is not None and 0 < rows[0].score < 1
    map_model(model)


def test_a_tied_head_shares_the_trains_or_is_refused_when_that_is_larger() -> None:
    model, rows = compressed("llama_gqa", PASSES["tensorgpt"](fraction=0.6, head="share"))
    assert isinstance(model.get_output_embeddings(), TensorTrainHead)
    assert torch.equal(model.get_output_embeddings().dense_weight(), model.get_input_embeddings().dense_weight())
    assert parameters(model) < parameters(tiny_model("llama_gqa")) and len(rows) == 2
    assert torch.equal(logits(reloaded(model)), logits(model))
    same, rows = compressed("llama_gqa", PASSES["tensorgpt"](fraction=0.2, head="share"))
    assert "twice" in (rows[0].degraded or "")
    assert torch.equal(logits(same), logits(tiny_model("llama_gqa", seed=1)))
    with pytest.raises(CompressError, match="the output head is tied to the embedding"):
        compressed("llama_gqa", PASSES["tensorgpt"](head="keep"))


def test_more_rank_loses_less_and_a_scaled_embedding_keeps_its_scale() -> None:
    lost = [compressed("llama", PASSES["tensorgpt"](rank=rank))[1][0].score or 0 for rank in (1, 2, 3)]
    assert lost == sorted(lost, reverse=True) and lost[0] > lost[-1]

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 8.0

    model = tiny_model("llama", seed=1)
    scaled = Scaled(*model.get_input_embeddings().weight.shape)
    scaled.weight = model.get_input_embeddings().weight
    model.set_input_embeddings(scaled)
    compressed("llama", PASSES["tensorgpt"](rank=2), model=model)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, TensorTrainEmbedding) and embedding.scale == pytest.approx(8.0, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [("tensor_train", {"eps": 0.1, "fraction": 0.2}), ("tensorgpt", {"rank": 2, "fraction": 0.2})],
)
def test_two_budgets_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give "):
        PASSES[name](**options)
