"""Weight sharing: one codebook for a matrix, zeros stay zero, and a weight counts by the inputs it meets."""

from __future__ import annotations

import torch

from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.modules.trainable_roles import TrainableRoles
from llmcompress.numerics.codebook import nearest_level, shared_levels
from tests.passes.decomposition.factored import block_pass, compressed

GENERATOR = torch.Generator().manual_seed(0)


def test_levels_are_those_of_a_slow_weighted_k_means():
    values_N, counts_N = torch.randn(300, generator=GENERATOR), torch.rand(300, generator=GENERATOR) + 0.1
    centres = torch.linspace(float(values_N.min()), float(values_N.max()), 8, dtype=torch.float64)
    for _ in range(30):
        nearest = (values_N.double()[:, None] - centres).abs().argmin(1)
        for level in range(8):
            mine = nearest == level
            if mine.any():
                centres[level] = (values_N.double() * counts_N)[mine].sum() / counts_N.double()[mine].sum()
    torch.testing.assert_close(shared_levels(values_N, 8, counts_N)[0], centres.float(), rtol=1e-5, atol=1e-6)


def test_a_matrix_has_one_codebook_and_keeps_every_zero():
    masks: dict[str, torch.Tensor] = {}
    model, _ = compressed("llama_gqa", block_pass("magnitude", sparsity=0.5))
    masks = {name: part.weight == 0 for name, part in model.named_modules() if name.endswith("_proj")}
    model, rows = compressed("llama_gqa", block_pass("magnitude", sparsity=0.5), block_pass("kmeans", bits=3))
    shared = [row for row in rows if row.algorithm == "kmeans"]
    assert len(shared) == len(masks)
    for row in shared:
        module = model.get_submodule(row.site)
        weight_OI = module.dense_weight()
        assert len(weight_OI.unique()) <= 8 and (weight_OI[masks[row.site]] == 0).all()
        assert module.spec()["shared"] and row.bits_per_weight and row.bits_per_weight < 16


def test_weights_that_count_more_are_nearer_to_a_level():
    values_N = torch.randn(500, generator=GENERATOR)
    counts_N = torch.where(values_N > 1, 50.0, 1.0)

    def error(levels_1L: torch.Tensor) -> float:
        nearest_N = levels_1L[0][nearest_level(values_N[None], levels_1L)[0].long()]
        return float((counts_N * (nearest_N - values_N).square()).sum())

    assert error(shared_levels(values_N, 4, counts_N)) < 0.8 * error(shared_levels(values_N, 4))


def test_shared_levels_are_rebuilt_and_trained_as_one():
    weight_IO = torch.randn(6, 10, generator=GENERATOR)
    levels_1L = shared_levels(weight_IO.flatten(), 4)
    codes_IO = nearest_level(weight_IO.reshape(1, -1), levels_1L).view(6, 10)
    none = torch.empty(0)
    module = CodebookLinear.from_codes(codes_IO, torch.full((6,), 2), {2: levels_1L}, none.long(), none, None)
    again = CodebookLinear.from_spec(module.spec(), torch.float32)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.dense_weight(), levels_1L[0][codes_IO.long()].T)
    roles = TrainableRoles(frozenset({"scales"}), keep_zeros=False, storage_dtype=torch.bfloat16)
    twin = module.trainable(roles)
    twin.dense_weight().sum().backward()
    ((_, levels),) = twin.trained()
    assert levels.shape == (1, 4) and torch.equal(
        levels.grad[0], codes_IO.flatten().int().bincount(minlength=4).float()
    )


def test_training_leaves_a_level_of_zero_where_it_is():
    levels_1L, none = torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), torch.empty(0)
    codes_IO = torch.randint(0, 4, (6, 10), generator=GENERATOR).to(torch.int16)
    module = CodebookLinear.from_codes(codes_IO, torch.full((6,), 2), {2: levels_1L}, none.long(), none, None)
    roles = TrainableRoles(frozenset({"scales"}), keep_zeros=True, storage_dtype=torch.bfloat16)
    twin = module.trainable(roles)
    ((_, levels),) = twin.trained()
    with torch.no_grad():
        levels += 0.5
    weight_OI = twin.compressed().dense_weight()
    assert torch.equal(weight_OI == 0, codes_IO.T == 1) and float(weight_OI.max()) == 2.5
