"""Blocks that run only for the tokens that need them, with a KV cache that stays complete.

B = sequences, T = tokens, D = hidden size. Whether a token skips a block depends only on that token's own hidden state,
so cached decoding and one forward pass over the whole text decide alike. A skipped token leaves the block unchanged,
but the block still stores its keys and values, computed from its input state, and later tokens attend to them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.expression import Expression, Opaque
from llmcompress.modules.wrapper import Wrapper

_HIDDEN = "hidden_states"
"""The name under which some models pass the hidden state to a block; the others pass it first."""


@dataclass
class Tally:
    """Counts of what ran."""

    total: float = 0
    """Input tokens (blocks), or input elements (activations)."""
    active: float = 0
    """Those that were used."""
    calls: int = 0
    skipped_calls: int = 0
    """Calls whose tokens all skipped: only these save time."""

    @property
    def share(self) -> float:
        """The fraction that was used."""
        return self.active / self.total if self.total else 1.0


class DynamicBlock(Wrapper):
    """Skips the wrapped block for some tokens; saves time when all tokens of a call skip it, as in decoding one
    sequence.

    If only some tokens of a call skip, the block runs for all, and its output is used for the others, so every sequence
    of a batch gets the same result as alone. Outputs collected inside blocks (`output_attentions`) are missing for
    blocks that did not run.
    """

    tally: Tally | None = None

    def __init__(self) -> None:
        super().__init__()
        self._form: tuple[bool, ...] | None = None
        """Of the block's last output: None for a bare tensor, else what follows the hidden state: is it the cache?"""
        self._form_known = False

    @override
    def expression(self) -> Expression:
        return Opaque("which tokens run the block is decided while it runs")

    @abstractmethod
    def skips(self, hidden_BTD: Tensor) -> Tensor:
        """True for every token (B×T) that skips the block."""

    def leave(self, hidden_BTD: Tensor) -> Tensor:
        """The hidden state that later blocks get; unchanged by default."""
        return hidden_BTD

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output, in the block's own form."""
        hidden_BTD: Tensor = kwargs[_HIDDEN] if _HIDDEN in kwargs else args[0]
        skipped_BT = self.skips(hidden_BTD)
        skipped = int(skipped_BT.sum())
        idle = skipped == skipped_BT.numel()
        self._count(skipped_BT.numel(), skipped, idle)
        if idle and self._form_known and not kwargs.get("output_attentions"):
            cache = fill_cache(self.inner, args, kwargs)
            left = self.leave(hidden_BTD)
            return left if self._form is None else (left, *(cache if here else None for here in self._form))
        output = self.inner(*args, **kwargs)
        bare = isinstance(output, Tensor)
        rest = () if bare else output[1:]
        self._form, self._form_known = None if bare else tuple(_is_cache(each) for each in rest), True
        new_BTD = output if bare else output[0]
        if skipped:
            new_BTD = torch.where(skipped_BT[..., None], hidden_BTD, new_BTD)
        left = self.leave(new_BTD)
        return left if bare else (left, *rest)

    def _count(self, tokens: int, skipped: int, idle: bool) -> None:
        if self.tally:
            self.tally.total += tokens
            self.tally.active += tokens - skipped
            self.tally.calls += 1
            self.tally.skipped_calls += idle


class CacheFilledError(Exception):
    """Keys and values are stored: nothing that the block still wants to compute is needed."""


class _FillingCache:
    """A cache that lets a block store its keys and values, and then stops it."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Store, then leave the block."""
        self._cache.update(*args, **kwargs)
        raise CacheFilledError


def fill_cache(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block up to the point where it has stored keys and values: norm, projections and rotation, no more.

    Works for every block that stores them through `Cache.update`; one that does not is run to its end, and keeps
    whatever state it has. Without a cache nothing is run. The cache, or None.
    """
    cache = next((value for value in (*args, *kwargs.values()) if _is_cache(value)), None)
    if cache is None:
        return None
    filling = _FillingCache(cache)
    with suppress(CacheFilledError):
        block(
            *(filling if value is cache else value for value in args),
            **{name: filling if value is cache else value for name, value in kwargs.items()},
        )
    return cache


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


@contextmanager
def tallied(model: nn.Module) -> Iterator[dict[str, Tally]]:
    """Count, within the context, what dynamic modules run and skip, by module name."""
    dynamic = {name: part for name, part in model.named_modules() if hasattr(type(part), "tally")}
    counts = {name: Tally() for name in dynamic}
    try:
        for name, part in dynamic.items():
            part.tally = counts[name]  # type: ignore[assignment]
        yield counts
    finally:
        for part in dynamic.values():
            part.tally = None  # type: ignore[assignment]
