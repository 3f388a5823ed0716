"""Shifts the channels of a fold: subtracts from the producer's bias, adds to its readers' biases. P = channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcompress.model.map import Fold


def has_biases(block: nn.Module, fold: Fold) -> bool:
    """Whether the producer and all its readers have one."""
    names = (fold.producer, *fold.consumers)
    return all(isinstance(getattr(block.get_submodule(name), "bias", None), Tensor) for name in names)


@torch.no_grad()
def shift_fold(block: nn.Module, fold: Fold, shift_P: Tensor, *, storage_dtype: torch.dtype) -> None:
    """Lower what the producer gives by `shift_P`; the readers add what their weights make of it.

    Legal only where the channels reach the readers as they are, or as averages over tokens. The producer's bias is
    rounded to the type it will be stored in, and the readers take up exactly what it gave.
    """
    bias_P = block.get_parameter(f"{fold.producer}.bias")
    before_P = bias_P.double()
    bias_P.copy_((before_P - shift_P).to(storage_dtype))
    given_C = (before_P - bias_P.double())[torch.tensor(fold.channel_map, device=bias_P.device)]
    for name in fold.consumers:
        reader = block.get_submodule(name)
        weight = reader.get_parameter("weight").double()
        reader.get_parameter("bias").add_((weight.T if isinstance(reader, Conv1D) else weight) @ given_C)
