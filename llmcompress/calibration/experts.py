"""Runs all calibration tokens through all experts while they are measured, regardless of the router."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import CompressError
from llmcompress.model.skeleton import HIDDEN_KEYWORD
from llmcompress.modules.experts import expert_calls, routes_itself

WORD = "experts"
"""What every family calls its list of experts; transformers recognises them by this word too."""


class AllTokens:
    """Whether experts run at the moment only to be measured."""

    def __init__(self) -> None:
        self.running = False
        self._input_NH = torch.empty(0)

    def run(self, experts: nn.ModuleList, x_NH: Tensor) -> None:
        """Run every expert once on every token."""
        self._input_NH = x_NH
        self.running = True
        try:
            for run in expert_calls(experts):
                run(x_NH)
        finally:
            self.running = False

    def check(self, name: str, x_MH: Tensor) -> None:
        """Raises: CompressError when an expert, called by the model, reads what is no token of the list's input."""
        if not self.running and len(x_MH) and not bool((self._input_NH == x_MH[0]).all(1).any()):
            raise CompressError(
                "calibration.experts",
                "the experts do not read their layer's input, so they cannot all see all tokens",
                where=name,
                fix="set `calibration.experts: routed`",
            )


@contextmanager
def all_tokens(block: nn.Module) -> Iterator[AllTokens]:
    """While this lasts, each list of experts first runs whole on all tokens, then as the router says."""
    state = AllTokens()
    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if not isinstance(module, nn.ModuleList) or name.rpartition(".")[2] != WORD:
                continue
            routes = routes_itself(module)
            holder = module if routes else block.get_submodule(name.rpartition(".")[0])
            hooks.callback(holder.register_forward_pre_hook(_first(state, module), with_kwargs=True).remove)
            if not routes:
                for index, expert in enumerate(module):
                    hooks.callback(expert.register_forward_pre_hook(_checked(state, f"{name}.{index}")).remove)
        yield state


def in_expert(site: str) -> bool:
    """Whether a linear belongs to an expert that the router may leave out."""
    return WORD in site.split(".")


def _first(state: AllTokens, experts: nn.ModuleList) -> Callable[..., None]:
    def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs[HIDDEN_KEYWORD]
        state.run(experts, hidden.reshape(-1, hidden.shape[-1]))

    return run


def _checked(state: AllTokens, name: str) -> Callable[..., None]:
    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        state.check(name, args[0].reshape(-1, args[0].shape[-1]))

    return look
