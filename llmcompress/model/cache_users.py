"""Finds the modules that store keys and values in a cache, and their shapes, in one short forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from llmcompress.errors import CompressError
from llmcompress.modules.cache_names import cache_argument, with_cache


@dataclass(frozen=True)
class CacheUser:
    """A module that stores keys and values; pairs are of keys and of values."""

    name: str
    argument: str
    """Name of its cache argument."""
    layer: int
    """Its layer index in the cache."""
    heads: tuple[int, int]
    widths: tuple[int, int]

    @property
    def numbers_per_token(self) -> int:
        """How many numbers are stored for every token."""
        return sum(count * width for count, width in zip(self.heads, self.widths, strict=True))


Watch = Callable[[Tensor, Tensor, int], None]


class _Watched(DynamicCache):  # type: ignore[misc]
    """A cache that reports what is stored, and keeps nothing."""

    def __init__(self, config: Any, watch: Watch) -> None:
        super().__init__(config=config)
        self._watch = watch

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Show, and give back what came: right for a first call."""
        self._watch(key_states, value_states, layer_idx)
        return key_states, value_states


@torch.no_grad()
def watch_cache(model: PreTrainedModel, ids_BT: Tensor, watch: Watch) -> None:
    """Show the keys and values (B×H×T×D) that each layer would store for these tokens."""
    watched = with_cache(model.base_model.forward, _Watched(model.config, watch))
    model.base_model(input_ids=ids_BT, **watched, use_cache=True)


def cache_users(model: PreTrainedModel, ids_BT: Tensor) -> list[CacheUser]:
    """The modules that store keys and values, in model order.

    Raises: CompressError when there are none, or one gets its cache in a way that cannot be repeated.
    """
    running: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    found: list[CacheUser] = []

    def begin(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append((name, module, args, kwargs))

        return note

    def see(keys: Tensor, values: Tensor, layer: int) -> None:
        name, module, args, kwargs = running[-1]
        found.append(
            CacheUser(
                name,
                _argument(name, module, args, kwargs),
                layer,
                (keys.shape[1], values.shape[1]),
                (keys.shape[-1], values.shape[-1]),
            )
        )

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(begin(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(lambda *_: (running.pop(), None)[1]).remove)
        if cache_argument(model.base_model.forward):
            watch_cache(model, ids_BT, see)
    if not found or len({user.name for user in found}) < len(found):
        raise CompressError(
            "kv_cache.none",
            f"{type(model).__name__} does not store keys and values once per attention in transformers' cache",
            where=", ".join(sorted({user.name for user in found})[:3]) or "no module stores any",
            fix="remove kv_cache from the recipe for this model",
        )
    return found


def _argument(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    by_name = next((key for key, value in kwargs.items() if isinstance(value, _Watched)), None)
    if by_name is not None:
        return by_name
    place = next((index for index, value in enumerate(args) if isinstance(value, _Watched)), None)
    if place is None:
        raise CompressError(
            "kv_cache.argument",
            f"{type(module).__name__} does not receive the cache as an argument",
            where=name,
            fix="remove kv_cache from the recipe for this model",
        )
    return list(inspect.signature(module.forward).parameters)[place]
