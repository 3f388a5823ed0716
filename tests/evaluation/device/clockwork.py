"""A runner with a clock of its own, for tests of what is measured around runners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmcompress.runners.base import Runner


class Clockwork(Runner):
    """Takes the seconds that it is told to, on a clock of its own."""

    name = "clockwork"
    vocabulary, max_positions, device = 50, None, torch.device("cpu")

    def __init__(self, name: str = "", *, prefill: float = 1.0, step: float = 1.0) -> None:
        self.called, self.prefill, self.step = name, prefill, step
        self.log: list[tuple[str, Any]] = []
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        for number in range(max_new_tokens):
            self.now += self.step if number else self.prefill
            self.log.append((self.called, ids_BT.shape[1] if not number else 1))
            yield ids_BT[:, 0]

    @classmethod
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Clockwork:
        raise AssertionError

    def logits(self, ids_BT: Tensor) -> Tensor:
        return torch.zeros(*ids_BT.shape, self.vocabulary)

    def generate(self, prompts: Any, *, max_new_tokens: int, stop: Any = ()) -> list[list[int]]:
        raise AssertionError

    def close(self) -> None:
        pass
