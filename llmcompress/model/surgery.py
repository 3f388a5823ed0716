"""Folding factors through a block: divide here, multiply there, and the block computes what it did before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import CompressError
from llmcompress.model.map import Fold


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, divide_P: Tensor, *, storage_dtype: torch.dtype | None = None) -> None:
    """Divide producer channel p by `divide_P[p]` and multiply every consumer column that it feeds by the same.

    With `storage_dtype` a norm's gain is rounded to the type it will be stored in and the consumers get the exact
    ratio of the old gain to the rounded one, so that no error of rounding the gain remains. See `_divide_norm`.

    Raises: CompressError for factors that are not positive finite numbers, or that touch channels no consumer reads.
    """
    if not fold_factors_ok(fold, divide_P):
        raise CompressError(
            "fold.bad-factors",
            f"the factors for {fold.producer} must be finite, positive, and 1 for channels that no consumer reads",
            where=fold.producer,
            fix="look for infinities in the activations of the calibration run; a larger dtype may avoid them",
        )
    producer = block.get_submodule(fold.producer)
    divide_P = divide_P.double()
    if fold.producer_is_norm:
        multiply_P = _divide_norm(producer, fold.offset, divide_P, storage_dtype)
    else:
        _multiply_rows(producer, 1 / divide_P)
        multiply_P = divide_P
    columns = torch.tensor(fold.channel_map, device=multiply_P.device)
    for consumer in fold.consumers:
        _multiply_columns(block.get_submodule(consumer), multiply_P[columns])


def fold_factors_ok(fold: Fold, divide_P: Tensor) -> bool:
    """Whether the factors are finite and positive, and 1 wherever no consumer would undo them."""
    if divide_P.dim() != 1 or len(divide_P) <= max(fold.channel_map):
        return False
    unread = torch.ones_like(divide_P, dtype=torch.bool)
    unread[torch.tensor(fold.channel_map, device=divide_P.device)] = False
    return bool(divide_P.isfinite().all() and (divide_P > 0).all() and (divide_P[unread] == 1).all())


def _divide_norm(norm: nn.Module, offset: float, divide_P: Tensor, storage_dtype: torch.dtype | None) -> Tensor:
    """Divide a norm's gain and bias; what the consumers must be multiplied by to undo exactly that.

    The stored gain g' is the rounded g/d. Multiplying by m = g/g' instead of d makes g'·m = g without error. A bias
    becomes the rounded b/m: its error is that of one rounding, never more than with the plain d, while the gain's is
    zero instead of one rounding; hence m is used with a bias too. Where g = 0 the channel is b alone and m = b/b'.
    Where that is 0 as well any factor will do: d. Where rounding would turn a non-zero g into 0 the channel is left
    as it was. Powers of two are exact in all of this.
    """
    gain_P = norm.weight.double() + offset  # type: ignore[operator, union-attr]
    bias_P = None if getattr(norm, "bias", None) is None else norm.bias.double()  # type: ignore[union-attr, operator]
    dtype = storage_dtype or norm.weight.dtype  # type: ignore[union-attr]
    new_weight_P = (gain_P / divide_P - offset).to(dtype).double()  # type: ignore[arg-type]
    new_gain_P = new_weight_P + offset
    lost_P = (new_gain_P == 0) & (gain_P != 0)
    new_weight_P = torch.where(lost_P, gain_P - offset, new_weight_P)
    new_gain_P = torch.where(lost_P, gain_P, new_gain_P)
    multiply_P = torch.where(gain_P == 0, divide_P, gain_P / new_gain_P)
    if bias_P is not None:
        new_bias_P = (bias_P / multiply_P).to(dtype).double()  # type: ignore[arg-type]
        alone_P = (gain_P == 0) & (bias_P != 0) & (new_bias_P != 0)
        multiply_P = torch.where(alone_P, bias_P / new_bias_P, multiply_P)
        norm.bias.copy_(new_bias_P)  # type: ignore[union-attr, operator]
    norm.weight.copy_(new_weight_P)  # type: ignore[union-attr, operator]
    return multiply_P


def _multiply_rows(linear: nn.Module, factors_O: Tensor) -> None:
    weight = _dense(linear)
    weight.copy_(weight.double() * (factors_O if isinstance(linear, Conv1D) else factors_O[:, None]))
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() * factors_O)  # type: ignore[union-attr, operator]


def _multiply_columns(linear: nn.Module, factors_I: Tensor) -> None:
    weight = _dense(linear)
    weight.copy_(weight.double() * (factors_I[:, None] if isinstance(linear, Conv1D) else factors_I))


def _dense(linear: nn.Module) -> nn.Parameter:
    # A module that already holds codes computes its weight anew at each reading; writing to it would be lost.
    weight = linear.weight
    assert isinstance(weight, nn.Parameter), "factors can only be folded into dense linears"
    return weight
