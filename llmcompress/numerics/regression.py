"""Linear regressions on few examples, and the one that ranks best. N = examples, F = features, U = units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Fit = Callable[[Tensor, Tensor], Tensor]
"""Features N×F and targets N, both centred → weights F."""


def ridge(x_NF: Tensor, y_N: Tensor, strength: float) -> Tensor:
    """Least squares with `strength` · N · |β|²/2; the shortest solution where strength is 0."""
    examples, features = x_NF.shape
    if strength == 0:
        shortest_F: Tensor = torch.linalg.pinv(x_NF) @ y_N
        return shortest_F
    if features <= examples:
        identity_FF = torch.eye(features, dtype=x_NF.dtype, device=x_NF.device)
        weights_F: Tensor = torch.linalg.solve(x_NF.T @ x_NF + strength * examples * identity_FF, x_NF.T @ y_N)
        return weights_F
    identity_NN = torch.eye(examples, dtype=x_NF.dtype, device=x_NF.device)
    dual_N: Tensor = torch.linalg.solve(x_NF @ x_NF.T + strength * examples * identity_NN, y_N)
    return x_NF.T @ dual_N


def lasso(x_NF: Tensor, y_N: Tensor, strength: float, *, iterations: int = 300) -> Tensor:
    """Least squares with `strength` · N · |β|₁."""
    return quadratic_lasso(x_NF.T @ x_NF, x_NF.T @ y_N, strength * len(x_NF), iterations=iterations)


def quadratic_lasso(
    products_FF: Tensor,
    target_F: Tensor,
    penalty: float,
    *,
    start_F: Tensor | None = None,
    steepest: float | None = None,
    iterations: int = 300,
) -> Tensor:
    """The β with the least βᵀAβ/2 - bᵀβ + penalty·|β|₁, by accelerated proximal gradients.

    `steepest` is the largest eigenvalue of A, for callers who know it.

    Source: Beck and Teboulle, FISTA, SIAM J. Imaging Sciences 2(1), 2009; restarted where momentum points uphill.
    """
    steepest = steepest or float(torch.linalg.eigvalsh(products_FF)[-1])
    step = 1 / max(steepest, torch.finfo(products_FF.dtype).tiny)
    beta_F = torch.zeros_like(target_F) if start_F is None else start_F.clone()
    ahead_F, momentum = beta_F, 1.0
    for _ in range(iterations):
        moved_F = ahead_F - step * (products_FF @ ahead_F - target_F)
        new_F = moved_F.sign() * (moved_F.abs() - step * penalty).clamp_min(0)
        if float((ahead_F - new_F) @ (new_F - beta_F)) > 0:
            momentum = 1.0
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_F = new_F + (momentum - 1) / faster * (new_F - beta_F)
        beta_F, momentum = new_F, faster
    return beta_F


def lasso_order(products_UU: Tensor, *, points: int = 32) -> Tensor:
    """How late each unit's coefficient becomes zero while the penalty grows: its importance for the sum of all units.

    `products_UU` are inner products of the units' outputs; the target is their sum. The penalty runs down a geometric
    path, each solution starting from the last; a unit's importance is the largest penalty, relative to the one that
    makes all zero, at which it is still in use, then by the size of what it adds there.

    Source: He et al., arXiv 1707.06168, section 3.1. Differs: one path for all counts instead of a search for each.
    """
    products_UU = products_UU.double()
    sizes_U = products_UU.diagonal().clamp_min(0).sqrt()
    live_U = sizes_U > 0
    sizes_U = torch.where(live_U, sizes_U, 1.0)
    # units of equal length: a coefficient then says how much of the output is made from the unit
    products_UU = products_UU / sizes_U / sizes_U[:, None]
    target_U = products_UU @ (sizes_U * live_U)
    largest = float(target_U.abs().max())
    importance_U = torch.zeros_like(sizes_U)
    if largest == 0:
        return importance_U
    beta_U = torch.zeros_like(sizes_U)
    steepest = float(torch.linalg.eigvalsh(products_UU)[-1])
    for point in range(points):
        share = 10 ** (-3.2 * (point + 1) / points)
        penalty = share * largest
        beta_U = quadratic_lasso(products_UU, target_U, penalty, start_F=beta_U, steepest=steepest, iterations=60)
        entered_U = (beta_U != 0) & (importance_U == 0)
        importance_U = torch.where(entered_U, share * (1 + 0.2 * beta_U.abs() / (1 + beta_U.abs().max())), importance_U)
    never_U = (importance_U == 0) & live_U
    return torch.where(never_U, 1e-5 * target_U.abs() / largest, importance_U)


def kendall_tau(a_N: Tensor, b_N: Tensor) -> float:
    """Rank correlation, -1 … 1, ties counted as in tau-b; 0 where one side is constant."""
    pairs = torch.triu_indices(len(a_N), len(a_N), 1, device=a_N.device)
    order_a = (a_N[pairs[0]] - a_N[pairs[1]]).sign().double()
    order_b = (b_N[pairs[0]] - b_N[pairs[1]]).sign().double()
    norm = float((order_a.abs().sum() * order_b.abs().sum()).sqrt())
    return float(order_a @ order_b) / norm if norm > 0 else 0.0


@dataclass(frozen=True)
class RankedFit:
    """Weights fitted to all examples by the model that ordered held-out ones best."""

    weights_F: Tensor
    model: str
    tau: float
    """Mean Kendall tau on the held-out folds."""


MODELS: dict[str, Fit] = {
    **{f"ridge {strength:g}": partial(ridge, strength=strength) for strength in (1e-3, 1e-2, 0.1, 1.0, 10.0)},
    **{f"lasso {strength:g}": partial(lasso, strength=strength) for strength in (1e-4, 1e-3, 1e-2)},
}
"""Strengths are for features and targets of unit deviation."""


def fit_by_rank(x_NF: Tensor, y_N: Tensor, *, folds: int = 5) -> RankedFit:
    """Fit every model on all folds but one, keep the one whose order of the held-out targets is the best.

    Source: Dery et al., arXiv 2402.05406 (Bonsai), and its repository: five folds, Kendall tau.
    """
    x_NF, y_N = x_NF.double(), y_N.double()
    fold_N = torch.arange(len(x_NF), device=x_NF.device) // 2 % folds  # a mask and its complement stay together
    best: tuple[float, str] | None = None
    for name, fit in MODELS.items():
        taus = []
        for fold in range(folds):
            held_N = fold_N == fold
            if int(held_N.sum()) < 2:
                continue
            weights_F, centre_F = _standard(fit, x_NF[~held_N], y_N[~held_N])
            taus.append(kendall_tau((x_NF[held_N] - centre_F) @ weights_F, y_N[held_N]))
        tau = sum(taus) / max(len(taus), 1)
        if best is None or tau > best[0]:
            best = (tau, name)
    assert best is not None
    return RankedFit(_standard(MODELS[best[1]], x_NF, y_N)[0], best[1], best[0])


def _standard(fit: Fit, x_NF: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weights for features as they are, fitted on standardised ones; the features' means."""
    centre_F = x_NF.mean(0)
    spread_F = x_NF.std(0, unbiased=False)
    spread_F = torch.where(spread_F > 0, spread_F, 1.0)
    spread_y = float(y_N.std(unbiased=False)) or 1.0
    weights_F = fit((x_NF - centre_F) / spread_F, (y_N - y_N.mean()) / spread_y)
    return weights_F * spread_y / spread_F, centre_F
