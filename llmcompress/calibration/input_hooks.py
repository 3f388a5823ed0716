"""Hooks that pass a module's inputs to observers while the model runs. T = tokens, I = inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmcompress.calibration.experts import AllTokens


class InputObserver(Protocol):
    """A statistic, for instance."""

    def add(self, x_TI: Tensor) -> None:
        """Take in more tokens."""


class LastInput:
    """Keeps what was shown last."""

    x_TI: Tensor

    def add(self, x_TI: Tensor) -> None:
        """Forget what was there before."""
        self.x_TI = x_TI


@contextmanager
def observed_input(
    module: nn.Module, observers: Collection[InputObserver], only: AllTokens | None = None
) -> Iterator[None]:
    """Show every input of the module to the observers, as T×I in float32, for as long as the context lasts.

    With `only`, those alone that come while all experts run on all tokens.
    """

    def show(_: nn.Module, args: tuple[Any, ...]) -> None:
        if only is not None and not only.running:
            return
        x_TI = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        for observer in observers:
            observer.add(x_TI)

    handle: RemovableHandle = module.register_forward_pre_hook(show)
    try:
        yield
    finally:
        handle.remove()
