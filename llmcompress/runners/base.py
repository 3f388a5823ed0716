"""The interface of every runtime: logits, greedy generation, and a few facts. B = sequences, T = tokens, V =
vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from types import TracebackType
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from llmcompress.registry import Registry
from llmcompress.runners.work import Work


class Runner(ABC):
    """A model that can be run by any runtime; metrics use nothing else.

    As a context manager, it releases its resources (memory, a device, a child process) at the end.
    """

    name: ClassVar[str]
    """What reports call the runtime."""
    vocabulary: int
    """Logits per position."""
    max_positions: int | None
    """The longest sequence the model was made for; None: no limit, or it does not say."""
    device: torch.device
    """Where `logits` leaves its result."""

    @classmethod
    @abstractmethod
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Load a folder, a Hub id or `builtin:...`; a runtime that fixes its number format ignores `dtype`.

        Raises: CompressError when it cannot be loaded.
        """

    @abstractmethod
    def logits(self, ids_BT: Tensor) -> Tensor:
        """B×T×V: for each position the scores of the token that follows, on `device`.

        In float32, or in the dtype that the runtime computes in. All sequences are equally long: nothing is padded.
        The caller may overwrite the result.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """The most likely next token, again and again, with a key-value cache: for every prompt its new tokens.

        Prompts have at least one token and may differ in length; a text ends before the first token of `stop`. Every
        prompt gets what it gets alone, and settings that come with the model (sampling, penalties) are not used. Here
        by `stream`, one prompt after the other; a runtime that pads batches correctly may do better.
        """
        found = []
        for prompt in prompts:
            new: list[int] = []
            for token_1 in self.stream(torch.tensor([list(prompt)]), max_new_tokens=max_new_tokens):
                if int(token_1) in stop:
                    break
                new.append(int(token_1))
            found.append(new)
        return found

    @abstractmethod
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        """Greedy decoding as `generate` does it, step by step: yields the B new tokens of every step.

        The first ones come after the prefill. All sequences are equally long and no token stops a text, so a clock
        between the steps measures the runtime. On an accelerator the work may still be pending when its tokens are
        yielded.
        """

    def work(self, ids_BT: Tensor) -> Work | None:
        """What the prefill of these tokens computes, and what the decode step after it reads; None where a runtime
        cannot tell.
        """
        return None

    def first_not_finite(self, ids_BT: Tensor) -> str | None:
        """Which part of the model first computes NaN or Inf on these tokens; None where a runtime cannot tell."""
        return None

    def torch_module(self) -> nn.Module | None:
        """The model as modules of this process, to be looked at; None where the runtime has none."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give back what was taken; the runner is of no use afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


RUNNERS: Registry[Runner] = Registry("runner", "llmcompress.runners")
