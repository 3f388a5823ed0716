"""How fast an exported folder decodes beside transformers with ordinary float32 weights. T = tokens."""

from __future__ import annotations

import time
from statistics import median

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.model.stock import stock_model
from llmcompress.runners.base import Runner
from llmcompress.runners.torch_runner import TorchRunner

_TURNS = 3
_SHARE_OF_MEMORY = 2
"""Free memory must be so many times what the dense model takes."""


def decode_to_dense(runner: Runner, model: PreTrainedModel, prompt_T: Tensor, new_tokens: int) -> float | None:
    """Its decoding speed ÷ that of the stock model of the same config, median of turns in which both decode.

    The stock model has random weights: how long a token takes does not depend on them. None: there is no memory for it,
    or nothing to decode.
    """
    stock = stock_model(model)
    needed = sum(4 * parameter.numel() for parameter in stock.parameters())
    if new_tokens < 2 or psutil.virtual_memory().available < _SHARE_OF_MEMORY * needed:
        return None
    _fill(stock)
    with TorchRunner(stock) as dense:
        for each in (runner, dense):
            _seconds(each, prompt_T, 2)
        turns = [[_seconds(each, prompt_T, new_tokens) for each in (runner, dense)] for _ in range(_TURNS)]
    return median(theirs / ours for ours, theirs in turns)


def _seconds(runner: Runner, prompt_T: Tensor, new_tokens: int) -> float:
    """Of all steps after the first, which has the prefill."""
    steps = runner.stream(prompt_T[None], max_new_tokens=new_tokens)
    next(steps)
    begun = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - begun


def _fill(stock: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(stock.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-0.02, 0.02, generator=generator)
        setattr(stock.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    stock.tie_weights()
