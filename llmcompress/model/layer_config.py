"""A config with fewer blocks: adapts every list and count that refers to individual blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from transformers import PretrainedConfig

COUNT = "num_hidden_layers"
"""transformers answers for this name in every config, whatever the family calls it."""


def smaller_configs(config: PretrainedConfig, kept: Sequence[int], total: int) -> Iterator[PretrainedConfig]:
    """Copies of the config with only the kept blocks, the likeliest first.

    Lists with one entry per block are always cut. Lists of block numbers, repeated patterns and numbers that may count
    the first blocks are changed in addition, as few of them as possible: the caller says which copy is right.
    """
    optional = {
        name: value
        for name, old in vars(config.get_text_config()).items()
        if (value := _maybe_about_blocks(old, kept, total)) is not None and value != old and not _about_text(name)
    }
    for count in range(min(len(optional), 2) + 1):
        for names in combinations(optional, count):
            yield _smaller(config, kept, total, {name: optional[name] for name in names})
    yield _smaller(config, kept, total, optional)


def _smaller(config: PretrainedConfig, kept: Sequence[int], total: int, more: dict[str, Any]) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == total and not _about_text(name):
            setattr(text, name, type(value)(value[index] for index in kept))
    setattr(text, COUNT, len(kept))
    for name, value in more.items():
        setattr(text, name, value)
    return config


def _maybe_about_blocks(value: Any, kept: Sequence[int], total: int) -> Any:
    """What a value would become if it spoke of blocks; None where it cannot."""
    if type(value) is int and 0 < value < total:
        return sum(index < value for index in kept)  # the number of first blocks of some kind
    if not isinstance(value, list) or not value:
        return None
    if all(type(entry) is int and 0 <= entry < total for entry in value) and sorted(set(value)) == value:
        return [new for new, index in enumerate(kept) if index in value]
    if all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) for entry in value):
        flat = [kind for kinds, times in value for kind in list(kinds) * times]  # GPT-Neo: [[["global", "local"], 6]]
        if len(flat) == total:
            return [[[flat[index] for index in kept], 1]]
    return None


def _about_text(name: str) -> bool:
    """Lists of token ids and of names, which may be as long as the model is deep by chance."""
    return name.startswith("_") or name.endswith("_token_id") or name in vars(PretrainedConfig())
