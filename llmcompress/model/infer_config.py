"""Infers the plain config, if there is one, whose stock model has the shapes of a changed model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.model.facts import Facts, replaced_modules
from llmcompress.model.shrink import same
from llmcompress.model.stock import meta_model, reloaded, without_parameters

Changes = dict[str, Any]
"""Attribute of the text config → value."""

HEAD_SIZE = "head_dim"
"""The one name that must be known: many families read it, and only some note it in their config."""


_MOST_ROUNDS = 8
"""Searches before giving up; two are enough in all families tried."""

_WITHOUT_END: list[tuple[Any, Any]] = [(None, None)] * 10**6
"""The differences from a config of which no model can be built."""


@torch.no_grad()
def with_inferred_config(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model of a plain config, with the live model's own tensors; or the same model where there is none.

    The config is found by trying: sizes, head counts, None values and norm constants of the old one are changed until
    the stock model has exactly the live shapes and numbers. No weight is copied, and the logits stay as they are.
    """
    search = _Search(model)
    if search.is_as_config_says() or not search.is_uniform():
        return model
    tokens = _random_tokens(model)
    expected = _logits(model, tokens)
    for changes in search.solutions():
        stock = _with_tensors_of(model, changed(model.config, changes), search.replaced)
        with suppress(RuntimeError):  # the right sizes, and yet the family's forward does not fit them
            if same(_logits(stock, tokens), expected):
                return stock
    return model


def changed(config: PretrainedConfig, changes: Changes) -> PretrainedConfig:
    """A copy of the config with these attributes of its text part changed."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in changes.items():
        setattr(text, name, value)
    return config


@dataclass(frozen=True)
class _Move:
    """One attribute that could be changed."""

    name: str
    value: Any


class _Search:
    """Descends from the old config to one whose stock model differs in nothing, one or two attributes at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._kind, self._config = type(model), model.config
        stock = meta_model(self._kind, self._config)
        self.replaced = replaced_modules(model, stock)
        self._stock = Facts.of(stock, self.replaced)
        self._live = Facts.of(model, self.replaced).only_changed_from(self._stock)
        self._inert: set[str] = set()
        self._known: dict[frozenset[tuple[str, Any]], Facts | None] = {frozenset(): self._stock}

    def is_as_config_says(self) -> bool:
        """Whether the config describes the live model already."""
        return not self._differences({})

    def is_uniform(self) -> bool:
        """Whether one set of numbers could describe all blocks."""
        return self._live.is_uniform_beside(self._stock)

    def solutions(self) -> Iterator[Changes]:
        """Changes that leave no difference; after each, others that do without one of its changes.

        Half as many heads and heads of half the size look alike from outside: the logits must tell.
        """
        waiting: list[frozenset[tuple[str, Any]]] = [frozenset()]
        for _ in range(_MOST_ROUNDS):
            if not waiting:
                return
            banned = waiting.pop(0)
            for start in self._starts():
                found, fits = self._improve(start, banned)
                waiting += [banned | {change} for change in found.items() if change not in start.items()]
                if fits:
                    yield found
                    break

    def _starts(self) -> Iterator[Changes]:
        """The config as it is; then with the size of a head written down, where that changes nothing but is read."""
        yield {}
        text = self._config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        if heads and getattr(text, HEAD_SIZE, None) is None:
            size = text.hidden_size // heads
            other = self._facts({HEAD_SIZE: 2 * size})
            if self._facts({HEAD_SIZE: size}) == self._stock and other not in (self._stock, None):
                yield {HEAD_SIZE: size}

    def _improve(self, changes: Changes, banned: frozenset[tuple[str, Any]]) -> tuple[Changes, bool]:
        """As few differences as single moves and pairs of moves lead to, and whether none is left."""
        found = self._differences(changes)
        while found:
            moves = [move for move in self._moves(changes, found) if (move.name, move.value) not in banned]
            step, left = self._best(changes | {move.name: move.value} for move in moves)
            self._note_inert(changes, moves)
            if len(left) >= len(found):
                step, left = self._best(changes | pair for pair in self._pairs(moves))
            if len(left) >= len(found):
                return changes, False
            changes, found = step, left
        return self._needed(changes), True

    def _differences(self, changes: Changes) -> list[tuple[Any, Any]]:
        """How the live model differs from the stock model of the changed config."""
        facts = self._facts(changes)
        return _WITHOUT_END if facts is None else self._live.differences(facts)

    def _best(self, trials: Iterable[Changes]) -> tuple[Changes, list[tuple[Any, Any]]]:
        measured = ((trial, self._differences(trial)) for trial in trials)
        return min(measured, key=lambda pair: len(pair[1]), default=({}, _WITHOUT_END))

    def _needed(self, changes: Changes) -> Changes:
        """Without those that make no difference: they say something else than sizes."""
        for name in list(changes):
            fewer = {other: value for other, value in changes.items() if other != name}
            if not self._differences(fewer):
                changes = fewer
        return changes

    def _moves(self, changes: Changes, found: Iterable[tuple[Any, Any]]) -> list[_Move]:
        """Attributes in proportion to a size that differs, None values that could be a size, numbers to replace."""
        config = vars(changed(self._config, changes).get_text_config())
        numbers = {pair for pair in found if all(isinstance(side, int | float) for side in pair)}
        moves: dict[_Move, None] = {}
        for name, value in config.items():
            if name.startswith("_") or isinstance(value, bool) or name in self._inert:
                continue
            for live, stock in sorted(numbers):
                new = _moved(value, live, stock)
                if new is not None:
                    moves[_Move(name, new)] = None
        return list(moves)

    def _note_inert(self, changes: Changes, moves: Iterable[_Move]) -> None:
        """Attributes that do nothing to the model are not tried again: building models takes nearly all the time."""
        before = self._facts(changes)
        effective = {move.name for move in moves if self._facts(changes | {move.name: move.value}) != before}
        self._inert |= {move.name for move in moves} - effective

    def _pairs(self, moves: Iterable[_Move]) -> Iterator[Changes]:
        effective = (move for move in moves if move.name not in self._inert)
        for one, other in combinations(effective, 2):
            if one.name != other.name:
                yield {one.name: one.value, other.name: other.value}

    def _facts(self, changes: Changes) -> Facts | None:
        key = frozenset(changes.items())
        if key not in self._known:
            try:
                stock = meta_model(self._kind, reloaded(changed(self._config, changes)))
                self._known[key] = Facts.of(stock, self.replaced)
            except Exception:  # whatever a family raises about sizes that do not fit: there is no such model
                self._known[key] = None
        return self._known[key]


def _moved(value: Any, live: float, stock: float) -> Any:
    """What an attribute would become so that something that is `stock` becomes `live`; None where it cannot matter."""
    if value is None:
        return live if isinstance(live, int) else None
    if isinstance(value, float):
        return live if value == stock else None
    if type(value) is not int or type(live) is not int or type(stock) is not int or not stock:
        return None
    return None if value * live % stock else value * live // stock


def _with_tensors_of(model: PreTrainedModel, config: PretrainedConfig, replaced: frozenset[str]) -> PreTrainedModel:
    """The stock model of the config around the live model's own tensors and replaced modules."""
    stock = without_parameters(type(model), config)
    device = next(model.parameters()).device
    for name, module in list(stock.named_modules(remove_duplicate=False)):
        if any(name.startswith(f"{outer}.") for outer in replaced):
            continue
        live = model.get_submodule(name)
        if name in replaced:
            parent, _, leaf = name.rpartition(".")
            setattr(stock.get_submodule(parent), leaf, live)
            continue
        module.training = live.training
        module._parameters.update(live._parameters)
        for key, buffer in module._buffers.items():
            if buffer is not None and key in module._non_persistent_buffers_set:
                module._buffers[key] = buffer.to(device)
            elif buffer is not None:
                module._buffers[key] = live._buffers[key]
    if model.can_generate():
        stock.generation_config = model.generation_config
    return stock


def _random_tokens(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (2, 16), generator=generator).to(weight.device)


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits
    finally:
        for module, was in training.items():
            module.training = was
