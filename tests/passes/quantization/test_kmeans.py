"""Weight sharing: one codebook for a matrix, zeros stay zero, and a weight counts by the inputs it meets."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.modules.trainable_roles import TrainableRoles
from llmcompress.numerics.codebook import nearest_level, shared_levels, swept_levels
from llmcompress.numerics.gptq import Visit
from tests.passes.decomposition.factored import block_pass, compressed
from tests.reference.columns import remove_one_column_at_a_time

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


def test_compensated_codes_err_less_than_the_nearest_levels():
    _, rows = compressed("llama_gqa", block_pass("kmeans", bits=3))
    assert all(row.error < row.error_before for row in rows)
    _, plain = compressed("llama_gqa", block_pass("kmeans", bits=3, assignment="nearest"))
    # later blocks see other inputs, so only the first one's linears of the same input can be compared
    first = [row.site for row in rows if ".layers.0." in row.site and row.site.endswith("q_proj")]
    errors = {row.site: row.error for row in plain}
    before = {row.site: row.error_before for row in rows}
    assert first and all(abs(errors[site] / before[site] - 1) < 1e-4 for site in first)


def test_codes_are_those_of_the_textbook_loop():
    weight_OI = torch.randn(9, 12, generator=GENERATOR, dtype=torch.float64)
    inputs_TI = torch.randn(40, 12, generator=GENERATOR, dtype=torch.float64) * torch.linspace(3, 1, 12)
    pruned_OI = torch.rand(9, 12, generator=GENERATOR) < 0.4
    weight_OI = weight_OI.masked_fill(pruned_OI, 0.0)
    levels_1L = torch.tensor([[-1.5, -0.5, 0.0, 0.7, 1.2]], dtype=torch.float64)
    gram_II = inputs_TI.T @ inputs_TI
    order_I = gram_II.diagonal().argsort(descending=True)

    def textbook(column: int, ahead_OI: torch.Tensor, weight_O: torch.Tensor) -> torch.Tensor:
        nearest_O = levels_1L[0][(weight_O[:, None] - levels_1L).abs().argmin(1)]
        return nearest_O.masked_fill(pruned_OI[:, order_I[column]], 0.0)

    damped_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(12)
    slow_OI = remove_one_column_at_a_time(weight_OI[:, order_I], damped_II[order_I][:, order_I], textbook)
    visit = Visit.of(gram_II, damping=0.01, act_order=True, block=5)
    codes_IO = swept_levels(weight_OI, levels_1L, visit, pruned_OI)
    assert torch.equal(levels_1L[0][codes_IO.long()].T[:, order_I], slow_OI)
    assert (codes_IO.T[pruned_OI] == 2).all()


@pytest.mark.parametrize("levels", [16, 32])
def test_entropy_constrained_levels_take_fewer_bits_at_a_larger_error(levels):
    # tails so thin that some of the first levels, at equal distances, have no value at all
    values_N = torch.randn(4000, generator=GENERATOR)
    paid = []
    for entropy in (0.0, 0.02, 0.1):
        levels_1L = shared_levels(values_N, levels, entropy=entropy)
        assert levels_1L.shape == (1, levels) and (levels_1L.diff() >= 0).all()
        codes_N = nearest_level(values_N[None], levels_1L)[0].long()
        share_L = codes_N.bincount(minlength=levels).double() / len(values_N)
        bits = -float(torch.special.xlogy(share_L, share_L).sum()) / math.log(2)
        error = float((levels_1L[0][codes_N] - values_N).square().sum() / values_N.square().sum())
        # half a bit from what any code needs at least: the rate–distortion function of a normal distribution
        assert 0 <= bits - 0.5 * math.log2(1 / error) < 0.5
        paid.append((bits, error))
    assert paid == sorted(paid, reverse=True) and [error for _, error in paid] == sorted(error for _, error in paid)


def test_weights_that_count_more_are_nearer_to_a_level():
    values_N = torch.randn(500, generator=GENERATOR)
    counts_N = torch.where(values_N > 1, 50.0, 1.0)

    def error(levels_1L: torch.Tensor) -> float:
        nearest_N = levels_1L[0][nearest_level(values_N[None], levels_1L)[0].long()]
        return float((counts_N * (nearest_N - values_N).square()).sum())

    assert error(shared_levels(values_N, 4, counts_N)) < 0.8 * error(shared_levels(values_N, 4))


def test_shared_levels_are_rebuilt_and_a_levels_gradient_is_the_sum_of_its_weights_gradients():
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
    inputs_TI, wanted_TO = torch.randn(7, 6, generator=GENERATOR), torch.randn(7, 10, generator=GENERATOR)
    (twin(inputs_TI) * wanted_TO).sum().backward()
    ((_, levels),) = twin.trained()
    of_weights_OI = wanted_TO.T @ inputs_TI  # what an ordinary weight's gradient would be
    summed_L = [float(of_weights_OI.T[codes_IO == level].sum()) for level in range(4)]
    torch.testing.assert_close(levels.grad, torch.tensor([summed_L]), rtol=1e-4, atol=1e-4)


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
