"""Windows that no pass measures, on their way through the blocks. T = tokens, H = hidden size, N = windows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import BlockInfo
from llmcompress.model.skeleton import find_blocks, record


class HeldOutStream:
    """The held-out windows, block by block, as the stage found the model (`dense_NTH`) and as it is now (`now_NTH`)."""

    def __init__(self, model: PreTrainedModel, context: RunContext, windows_NT: Tensor) -> None:
        self._context = context
        with context.weights_at.running(model, torch.device("cpu")):
            recording = record(model, find_blocks(model), windows_NT)
        self._calls = recording.calls
        self.dense_NTH = self.now_NTH = recording.hidden

    def through(self, info: BlockInfo, module: nn.Module, hidden_NTH: Tensor) -> Tensor:
        """What a block, or another module in its place, makes of these hidden states; on the CPU."""
        return BlockWork(info, module, (), [self._calls[info.index]], self._context).outputs_for([hidden_NTH])[0]
