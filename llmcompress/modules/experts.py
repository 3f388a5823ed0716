"""Experts as separate linears, in place of an expert bank of two tensors. N, M = tokens, H = hidden size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec
from llmcompress.modules.expression import Expression, Opaque


@MODULES.register("unfused_experts")
class UnfusedExperts(CompressedModule, nn.ModuleList):
    """Gated experts, called as transformers 5 calls a bank; `names` are those of gate, up and down in a checkpoint.

    A checkpoint holds experts one by one, so a model with these is saved under the names of its stock model.
    """

    frame: ClassVar[bool] = True
    has_stock_format: ClassVar[bool] = True
    is_transparent: ClassVar[bool] = True

    def __init__(
        self, experts: int, hidden: int, inner: int, names: Sequence[str], activation: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.hidden, self.inner, self.names, self.activation = hidden, inner, tuple(names), activation
        self._act = (ACT2FN[activation],)  # not as a child: those are the experts
        gate, up, down = self.names
        for _ in range(experts):
            expert = nn.Module()
            expert.add_module(gate, nn.Linear(hidden, inner, bias=False, dtype=dtype))
            expert.add_module(up, nn.Linear(hidden, inner, bias=False, dtype=dtype))
            expert.add_module(down, nn.Linear(inner, hidden, bias=False, dtype=dtype))
            self.append(expert)

    @override
    def _guard(self) -> None:
        """None: nothing here is foreign to a stock loader."""

    @override
    def spec(self) -> Spec:
        return {
            "experts": len(self),
            "hidden": self.hidden,
            "inner": self.inner,
            "names": list(self.names),
            "activation": self.activation,
        }

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        experts, hidden, inner = (int(spec[key]) for key in ("experts", "hidden", "inner"))
        return cls(experts, hidden, inner, spec["names"], str(spec["activation"]), dtype)

    @override
    def is_dense(self) -> bool:
        """While all experts are ordinary linears of their first sizes: a checkpoint holds them as the bank's."""
        sizes = {(self.hidden, self.inner), (self.inner, self.hidden)}
        return all(
            type(part) is nn.Linear and part.bias is None and (part.in_features, part.out_features) in sizes
            for expert in self
            for part in expert.children()
        )

    @override
    def expression(self) -> Expression:
        return Opaque("which experts run is decided token by token")

    @override
    def differs_below(self, stock: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """From experts as they were when the bank was taken apart."""
        with torch.device("meta"):
            unchanged = self.from_spec(self.spec(), torch.float32)
        for (name, expert), before in zip(self.named_children(), unchanged.children(), strict=True):
            yield name, expert, before

    def run_expert(self, index: int, x_NH: Tensor) -> Tensor:
        """One expert on these tokens."""
        gate, up, down = (self[index].get_submodule(name) for name in self.names)
        y_NH: Tensor = down(self._act[0](gate(x_NH)) * up(x_NH))
        return y_NH

    @override
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, token by token."""
        total_NH = torch.zeros_like(hidden_states)
        for index in range(len(self)):
            token_M, place_M = torch.where(top_k_index == index)
            if len(token_M):
                y_MH = self.run_expert(index, hidden_states[token_M]) * top_k_weights[token_M, place_M, None]
                total_NH.index_add_(0, token_M, y_MH.to(total_NH.dtype))
        return total_NH


def routes_itself(experts: nn.ModuleList) -> bool:
    """Whether the model calls the list, with the router's choice, and not one expert after the other."""
    return isinstance(experts, UnfusedExperts)


def expert_calls(experts: nn.ModuleList) -> list[Callable[[Tensor], Tensor]]:
    """Each expert of a list, of whichever kind, as a function of tokens."""
    if isinstance(experts, UnfusedExperts):
        return [partial(experts.run_expert, index) for index in range(len(experts))]
    return list(experts)
