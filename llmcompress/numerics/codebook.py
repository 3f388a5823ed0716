"""A codebook for every column of a weight, or one for all.

O = outputs, C = columns, L = levels, I = inputs, B = columns of a lazy block, N = outliers, or values of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.numerics.columns import DropWeights, sweep_columns_
from llmcompress.numerics.gptq import Visit


def column_levels(weight_CO: Tensor, levels: int, *, turns: int = 15) -> Tensor:
    """Rising levels of every row of `weight_CO` (a column of the weight) by one-dimensional k-means: C×L.

    Starts from quantiles, so it is deterministic; a level that no value is nearest to stays where it was.

    Source: Lloyd, 1982.
    """
    sorted_CO = weight_CO.double().sort(1).values
    count = sorted_CO.shape[1]
    sums_CO = torch.nn.functional.pad(sorted_CO.cumsum(1), (1, 0))
    places = ((torch.arange(levels, device=weight_CO.device) + 0.5) / levels * count).long().clamp_max(count - 1)
    centres_CL = sorted_CO[:, places].contiguous()
    for _ in range(turns):
        ends_CL = torch.searchsorted(sorted_CO, _borders(centres_CL))
        edge = torch.zeros_like(ends_CL[:, :1])
        bounds = torch.cat([edge, ends_CL, edge + count], 1)
        members_CL = bounds.diff(dim=1)
        means_CL = sums_CO.gather(1, bounds).diff(dim=1) / members_CL.clamp_min(1)
        centres_CL = torch.where(members_CL > 0, means_CL, centres_CL)
    return centres_CL.to(weight_CO.dtype)


def shared_levels(
    values_N: Tensor, levels: int, weight_N: Tensor | None = None, *, entropy: float = 0.0, turns: int = 60
) -> Tensor:
    """Rising levels, 1×L, of all values by one-dimensional k-means; `weight_N` says how much each value counts.

    Starts from levels at equal distances between the smallest and the largest value: large weights, of which there are
    few, matter most, and a start from quantiles leaves them too few levels. A level that no value is nearest to stays.

    With `entropy` λ the codes' bits count too, as entropy-coded: the least of squared errors ÷ squared values + λ ·
    bits. Levels then spread towards equal distances, and one that has no value any more is given up: the last one is
    repeated in its place.

    Source: Han et al., arXiv 1510.00149 (Deep Compression), section 3.2 (linear initialization); entropy-constrained:
    Chou et al., IEEE Trans. ASSP 37 (1989); Choi et al., arXiv 1612.01543, section 4.
    """
    sorted_N, order_N = values_N.double().sort()
    counts_N = torch.ones_like(sorted_N) if weight_N is None else weight_N.double()[order_N].clamp_min(1e-30)
    mass_N = torch.nn.functional.pad(counts_N.cumsum(0), (1, 0))
    sum_N = torch.nn.functional.pad((counts_N * sorted_N).cumsum(0), (1, 0))
    price = entropy * float((counts_N * sorted_N.square()).sum() / mass_N[-1])
    steps = torch.linspace(0, 1, levels, dtype=torch.float64, device=values_N.device)
    centre_L = sorted_N[0] + steps * (sorted_N[-1] - sorted_N[0])
    bits_L = torch.zeros_like(centre_L)
    for turn in range(turns):
        # bits are not counted before levels have found their places: rare ones would be given up at once
        priced = price > 0 and turn >= turns // 2
        ends_L = torch.searchsorted(sorted_N, _priced_borders(centre_L, price * bits_L * priced))
        bounds = torch.cat([ends_L.new_zeros(1), ends_L, ends_L.new_full((1,), len(sorted_N))])
        there_L, mass_L = bounds.diff() > 0, mass_N[bounds].diff()
        moved_L = torch.where(there_L, sum_N[bounds].diff() / mass_L.clamp_min(1e-300), centre_L)
        if price and turn + 1 >= turns // 2:
            # before the first turn that counts bits too: an empty level's are infinite, and would move all borders
            moved_L, mass_L = moved_L[there_L], mass_L[there_L]
        elif not price and torch.equal(moved_L, centre_L):
            break
        centre_L, bits_L = moved_L, -(mass_L / mass_N[-1]).clamp_min(1e-300).log2()
    given_up = centre_L[-1].expand(levels - len(centre_L))
    return torch.cat([centre_L, given_up])[None].to(values_N.dtype)


def nearest_level(weight_CO: Tensor, levels_CL: Tensor) -> Tensor:
    """The index of the nearest of its row's rising levels for every value, as int16."""
    return torch.searchsorted(_borders(levels_CL), weight_CO.contiguous()).to(torch.int16)


class RoundToLevels:
    """Rounds columns of a sweep to the nearest of a few rising levels, the same for all, and keeps the codes."""

    every = 0

    def __init__(self, levels_1L: Tensor, inputs: int, outputs: int) -> None:
        self._levels_L, self._borders_L = levels_1L[0], _borders(levels_1L)[0]
        self.codes_IO = torch.zeros(inputs, outputs, dtype=torch.int16, device=levels_1L.device)

    def begin(self, column: int, ahead_BO: Tensor) -> None:
        """Levels are fixed beforehand: the whole matrix shares them."""

    def __call__(self, column: int, weight_O: Tensor) -> Tensor:
        """Nearest levels of one column."""
        code_O = torch.searchsorted(self._borders_L, weight_O)
        self.codes_IO[column] = code_O
        return self._levels_L[code_O]


def swept_levels(weight_OI: Tensor, levels_1L: Tensor, visit: Visit, pruned_OI: Tensor) -> Tensor:
    """Codes, I×O, every error pushed onto the columns still to come; what is pruned stays zero, which is a level then.

    Source: Frantar et al., arXiv 2210.17323, Algorithm 1, with a codebook for a grid.
    """
    assert visit.factor is not None
    visited_IO, zero_IO = weight_OI.T[visit.visit_I], pruned_OI.T[visit.visit_I]
    rounding = RoundToLevels(levels_1L, *visited_IO.shape)
    sweep_columns_(visited_IO, visit.factor.upper_II, DropWeights(zero_IO, rounding), block=visit.block)
    codes_IO = torch.empty_like(rounding.codes_IO)
    codes_IO[visit.visit_I] = rounding.codes_IO
    return codes_IO


def level_values(codes_CO: Tensor, levels_CL: Tensor) -> Tensor:
    """The values that codes stand for."""
    return levels_CL.gather(1, codes_CO.long())


def outliers(weight_OI: Tensor, squares_I: Tensor | None, share: float) -> Tensor:
    """Flat indices, rising, of two small sets of weights: those with the largest effect on outputs, and the largest.

    Each set has that fraction of the weights; the second is taken from what the first leaves. `squares_I` are sums of
    squared inputs; None: only magnitudes are known, and both sets come from them.

    Source: Chen et al., arXiv 2410.13056 (CMPQ): one set driven by activations, one by weights.
    """
    count = round(share * weight_OI.numel())
    size = weight_OI.abs().flatten()
    effect = size if squares_I is None else (weight_OI.abs() * squares_I.sqrt()).flatten()
    first = effect.topk(count).indices
    rest = size.clone()
    rest[first] = -1.0
    return torch.cat([first, rest.topk(count).indices]).sort().values


def without(weight_OI: Tensor, flat_N: Tensor) -> Tensor:
    """The weights with those at the flat indices replaced by the mean of their column's others."""
    kept_OI = torch.ones(weight_OI.shape, dtype=weight_OI.dtype, device=weight_OI.device)
    kept_OI.view(-1)[flat_N] = 0.0
    mean_I = (weight_OI * kept_OI).sum(0) / kept_OI.sum(0).clamp_min(1)
    return torch.where(kept_OI > 0, weight_OI, mean_I.expand_as(weight_OI))


def column_bits(outputs: int, bits: int, stored: int) -> int:
    """Stored bits of one column: its codes, padded to whole bytes, and its codebook."""
    return -(-outputs * bits // 8) * 8 + (stored << bits)


def squared_errors(weight_CO: Tensor, widths: Sequence[int]) -> Tensor:
    """The squared error of every column with a codebook of each width in bits: C×widths, float64."""
    errors = []
    for bits in widths:
        levels_CL = column_levels(weight_CO, 1 << bits)
        rounded_CO = level_values(nearest_level(weight_CO, levels_CL), levels_CL)
        errors.append((rounded_CO - weight_CO).double().square().sum(1))
    return torch.stack(errors, 1)


def _borders(levels_CL: Tensor) -> Tensor:
    """Half-way between neighbouring levels."""
    return ((levels_CL[:, 1:] + levels_CL[:, :-1]) / 2).contiguous()


def _priced_borders(centre_L: Tensor, price_L: Tensor) -> Tensor:
    """Where squared distance plus price is equal for neighbouring levels; rising."""
    gap_L = centre_L.diff().clamp_min(1e-300)
    return ((centre_L[1:] + centre_L[:-1]) / 2 + price_L.diff() / (2 * gap_L)).cummax(0).values
