"""MoDeGPT's three decompositions and its allocation. C = channels, O = outputs, V = value rows of a head, K = kept.

In float64, because Gram matrices are inverted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.numerics.columns import inverse_factor


def nystrom_channels(gram_CC: Tensor, keep: int, *, ridge: float) -> Tensor:
    """True for the channels that stay: those that the others explain worst.

    That is the highest ridge leverage 1 - λ [(G + λ)⁻¹]ᵢᵢ, so the smallest diagonal of the inverse; λ is `ridge` times
    the mean diagonal. Channels that were always zero go first; where no inverse exists the energy decides.

    Source: Lin et al., arXiv 2408.09632, Algorithm 1.
    """
    gram_CC = gram_CC.double()
    energy_C = gram_CC.diagonal()
    factor = inverse_factor(gram_CC, ridge)
    explained_C = -energy_C if factor is None else factor.upper_II.square().sum(0)
    explained_C = explained_C.masked_fill(energy_C == 0, torch.inf)
    kept_C = torch.zeros(len(gram_CC), dtype=torch.bool, device=gram_CC.device)
    kept_C[explained_C.argsort(stable=True)[:keep]] = True
    return kept_C


def coupling(query_energy_H: Tensor, key_energy: Tensor) -> Tensor:
    """What a set of query and key rows adds to the scores: √Σₕ |q|² |k|², over the query heads that share the keys.

    Energies are mean squares over tokens, summed over the rows of the set. A rotation of a rotary pair leaves them.

    Source: Lin et al., arXiv 2408.09632, Algorithm 2 (CR decomposition).
    """
    return (query_energy_H * key_energy).sum().sqrt()


def row_energy(weight_KI: Tensor, bias_K: Tensor | None, gram_II: Tensor, mean_I: Tensor, tokens: int) -> Tensor:
    """Mean square of every output over the calibration tokens."""
    weight_KI = weight_KI.double()
    energy_K = ((weight_KI @ gram_II.double()) * weight_KI).sum(1) / max(tokens, 1)
    if bias_K is not None:
        bias_K = bias_K.double()
        energy_K = energy_K + 2 * bias_K * (weight_KI @ mean_I.double()) + bias_K.square()
    return energy_K.clamp_min(0)


def value_basis(readers_OV: Sequence[Tensor], grams_VV: Sequence[Tensor], rank: int) -> Tensor:
    """Orthonormal rows K×V: the directions of a value head whose loss changes what its readers put out least.

    One reader and one Gram matrix (of what it reads of this head) per query head. With one query head the product of
    reader and basis is the best there is: the reader's weight times the root of the Gram matrix, cut at the rank.
    Heads that share their values share the basis; their Gram matrices are averaged.

    Source: Lin et al., arXiv 2408.09632, Algorithm 3. Differs: the Gram matrix is that of the averaged values that the
    reader gets, not of the block's input; readers count where several heads share values.
    """
    gram_VV = torch.stack([gram.double() for gram in grams_VV]).mean(0)
    energy_V, axes_VV = torch.linalg.eigh(gram_VV)
    root_VV = axes_VV * energy_V.clamp_min(0).sqrt()
    weight_VV = sum((reader.double().T @ reader.double() for reader in readers_OV), torch.zeros_like(gram_VV))
    # right singular vectors of W G½ by the eigenvectors of G½ᵀ WᵀW G½
    _, found_VV = torch.linalg.eigh(root_VV.T @ weight_VV @ root_VV)
    strongest_VK = found_VV.flip(1)[:, :rank]
    # W A U = (W G½ Q) (Qᵀ G^-½): the rows of Qᵀ G^-½ span what must be kept of the values
    inverse_VV = axes_VV * torch.where(energy_V > 1e-12 * energy_V[-1].clamp_min(1e-300), energy_V, torch.inf).rsqrt()
    basis_VK: Tensor = torch.linalg.qr(inverse_VV @ strongest_VK)[0]
    return basis_VK.T


def allocate(influence_L: Tensor, sizes_L: Tensor, most_L: Tensor, *, fraction: float, temperature: float) -> Tensor:
    """Share of every block to remove: more where a block changes its input less; all together exactly `fraction`.

    Shares are proportional to softmax(-influence ÷ temperature). No block loses more than its share in `most_L`; what
    is cut off there is spread over the others.

    Source: Lin et al., arXiv 2408.09632, eq. 12. Differs: shares are clipped (the formula can exceed 1) and weighted by
    the blocks' sizes.
    """
    weights_L = torch.softmax(-influence_L.double() / temperature, 0)
    sizes_L, most_L = sizes_L.double(), most_L.double()
    wanted = fraction * float(sizes_L.sum())
    full_L = torch.zeros(len(weights_L), dtype=torch.bool)
    while True:
        left = wanted - float((most_L * sizes_L)[full_L].sum())
        free = float((weights_L * sizes_L)[~full_L].sum())
        shares_L = torch.where(full_L, most_L, weights_L * (left / free if free > 0 else 0.0))
        over_L = (shares_L > most_L) & ~full_L
        if not bool(over_L.any()):
            return shares_L
        full_L |= over_L
