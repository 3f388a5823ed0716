"""Tensor trains and Tucker by their definitions: an entry at a time, numpy only."""

from __future__ import annotations

import itertools

import numpy as np


def entry_by_entry(cores: list[np.ndarray]) -> np.ndarray:
    """Every entry as the product of one matrix per core; cores R×I×R."""
    axes = [core.shape[1] for core in cores]
    tensor = np.zeros(axes)
    for index in itertools.product(*map(range, axes)):
        product = np.eye(1)
        for core, i in zip(cores, index, strict=True):
            product = product @ core[:, i, :]
        tensor[index] = product[0, 0]
    return tensor


def train_of(tensor: np.ndarray, ranks: list[int]) -> list[np.ndarray]:
    """TT-SVD as in the paper: reshape, singular value decomposition, cut, go on with the rest."""
    cores, rest, left = [], tensor, 1
    for axis, rank in zip(tensor.shape, ranks, strict=False):
        u, s, vt = np.linalg.svd(rest.reshape(left * axis, -1), full_matrices=False)
        rank = min(rank, len(s))
        cores.append(u[:, :rank].reshape(left, axis, rank))
        rest, left = np.diag(s[:rank]) @ vt[:rank], rank
    return [*cores, rest.reshape(left, tensor.shape[-1], 1)]


def higher_order_svd(tensor: np.ndarray, ranks: tuple[int, int, int]) -> np.ndarray:
    """What the truncated higher-order SVD leaves of a tensor: projected along every axis."""
    projected = tensor
    for axis, rank in enumerate(ranks):
        unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
        u = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        projected = np.moveaxis(np.tensordot(u @ u.T, projected, axes=([1], [axis])), 0, axis)
    return projected
