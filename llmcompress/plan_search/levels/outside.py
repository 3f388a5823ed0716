"""What stands before and behind the blocks of a model: embedding, final norm, head. B = sequences, T = tokens, D =
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.model.skeleton import Recorder, Recording, find_blocks, passing_on, record, recorders
from llmcompress.training.data.batch import Sample, padded
from llmcompress.training.head import Predictions, find_head, predictions


class Outside:
    """A model whose blocks are run by others; it is whole again whenever none of its methods is running."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.named = find_blocks(model)
        """Its blocks, by full name."""
        self._device = next(model.parameters()).device
        token = torch.zeros(1, 4, dtype=torch.long, device=self._device)
        with self._without_blocks():
            self._head = find_head(model, token)

    @torch.no_grad()
    def start(self, ids_BT: Tensor) -> Recording:
        """What the first block is given, and how every block is called."""
        return record(self.model, self.named, ids_BT.to(self._device))

    def predictions(self, ids_BT: Tensor, hidden_BTD: Tensor) -> Predictions:
        """What the model predicts if its last block gives these states."""
        with self._without_blocks() as standing, passing_on(standing[-1], hidden_BTD):
            batch = padded([Sample(ids_T) for ids_T in ids_BT]).to(self._device)
            return predictions(self.model, batch, self._head)

    @contextmanager
    def _without_blocks(self) -> Iterator[list[Recorder]]:
        with recorders(self.model, self.named) as standing:
            with torch.no_grad():  # see `recorders`
                self.model.base_model(
                    input_ids=torch.zeros(1, 2, dtype=torch.long, device=self._device), use_cache=False
                )
            yield standing
