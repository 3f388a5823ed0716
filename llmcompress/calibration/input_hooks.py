"""Hooks that pass a module's inputs to observers while the model runs. T = tokens, I = inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmcompress.calibration.experts import AllTokens, in_expert
from llmcompress.model.site import LinearSite


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


class EarlyEnd:
    """Ends a forward pass once some linears have received all tokens: nothing after the last of them is needed."""

    def __init__(self, linears: int) -> None:
        self._linears, self._tokens = linears, 0
        self._done: set[nn.Module] = set()

    @contextmanager
    def of(self, inputs_BTD: Tensor) -> Iterator[None]:
        """One forward of the block with this input."""
        self._tokens, self._done = inputs_BTD.shape[:-1].numel(), set()
        with suppress(_SeenEnough):
            yield

    def show(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A linear is about to run. One that is given some of the tokens may run again, so nothing ends with it."""
        if args[0].shape[:-1].numel() == self._tokens:
            self._done.add(module)
            if len(self._done) == self._linears:
                raise _SeenEnough


@contextmanager
def ending_early(sites: Sequence[LinearSite]) -> Iterator[EarlyEnd]:
    """Hooks of `EarlyEnd`, behind those that observe; none with experts among the sites, which not all tokens reach."""
    end = EarlyEnd(len(sites))
    with ExitStack() as hooks:
        for site in () if any(in_expert(site.name) for site in sites) else sites:
            hooks.callback(site.module.register_forward_pre_hook(end.show).remove)
        yield end


class _SeenEnough(Exception):
    """Private, so it can hide no error of the model's."""
