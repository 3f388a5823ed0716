"""Folds factors through a block: divides the producer and multiplies the consumers; the block computes the same."""

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
            fix="check the calibration activations for Inf; a wider dtype may avoid it",
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
    weight = norm.get_parameter("weight")
    dtype = storage_dtype or weight.dtype
    gain_P = weight.double() + offset
    stored_P = (gain_P / divide_P - offset).to(dtype).double()
    stored_P = torch.where((stored_P + offset == 0) & (gain_P != 0), weight.double(), stored_P)
    multiply_P = torch.where(gain_P == 0, divide_P, gain_P / (stored_P + offset))
    if getattr(norm, "bias", None) is not None:
        bias = norm.get_parameter("bias")
        bias_P = bias.double()
        stored_bias_P = (bias_P / multiply_P).to(dtype).double()
        alone_P = (gain_P == 0) & (stored_bias_P != 0)
        multiply_P = torch.where(alone_P, bias_P / stored_bias_P, multiply_P)
        bias.copy_(stored_bias_P)
    weight.copy_(stored_P)
    return multiply_P


def _multiply_rows(linear: nn.Module, factors_O: Tensor) -> None:
    # `get_parameter` refuses a module that holds codes: writing to its computed weight would be lost.
    weight = linear.get_parameter("weight")
    weight.copy_(weight.double() * (factors_O if isinstance(linear, Conv1D) else factors_O[:, None]))
    if getattr(linear, "bias", None) is not None:
        bias = linear.get_parameter("bias")
        bias.copy_(bias.double() * factors_O)


def _multiply_columns(linear: nn.Module, factors_I: Tensor) -> None:
    weight = linear.get_parameter("weight")
    weight.copy_(weight.double() * (factors_I[:, None] if isinstance(linear, Conv1D) else factors_I))
