"""Splits expert banks, which transformers 5 stores as two tensors, into linears."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from llmcompress.loading.mapped import MappedWeights, View, put_weights
from llmcompress.loading.versions import TRANSFORMERS_MAJOR
from llmcompress.model.skeleton import put_module
from llmcompress.modules.experts import UnfusedExperts

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_TOKENS = 8


@torch.no_grad()
def unfuse_experts(model: PreTrainedModel, mapped: MappedWeights | None = None) -> list[str]:
    """Replace every bank that is understood, in place; the weights are views of the bank's. Names of the banks.

    A bank is left as it is where it has biases or another layout, where a checkpoint does not hold its experts one by
    one, or where the linears compute something else than the bank (tried, if its weights are there). `mapped`: where
    weights that lie on disk come from; it learns the new names, and one bank at a time takes memory.
    """
    if TRANSFORMERS_MAJOR < 5:
        return []
    replaced = []
    for name in [name for name, _ in model.named_modules()]:
        try:
            bank = model.get_submodule(name)
        except AttributeError:  # inside a bank that was replaced
            continue
        experts = _taken_apart(model, name, bank)
        if experts is not None:
            put_module(model, name, experts)
            replaced.append(name)
            if mapped is not None:
                mapped.cut(_views(name, experts))
                put_weights(experts, mapped, name)
    return replaced


def _views(name: str, experts: UnfusedExperts) -> dict[str, View]:
    """Where in the bank every expert's weight is."""
    gate, up, down = experts.names
    places = {gate: (_GATE_UP, slice(0, experts.inner)), up: (_GATE_UP, slice(experts.inner, None))}
    places[down] = (_DOWN, slice(None))
    return {
        f"{name}.{index}.{leaf}.weight": View(f"{name}.{tensor}", index, rows)
        for index in range(len(experts))
        for leaf, (tensor, rows) in places.items()
    }


def _taken_apart(model: PreTrainedModel, name: str, bank: Any) -> UnfusedExperts | None:
    parameters = dict(bank.named_parameters(recurse=False))
    if set(parameters) != {_GATE_UP, _DOWN} or any(parameter.dim() != 3 for parameter in parameters.values()):
        return None
    both, down = parameters[_GATE_UP], parameters[_DOWN]
    count, hidden, inner = down.shape
    if both.shape != (count, 2 * inner, hidden) or not getattr(bank, "is_concatenated", True):
        return None
    names = _names_on_disk(model, name, count)
    activation = _activation(getattr(bank, "act_fn", None))
    if names is None or activation is None:
        return None
    with torch.device("meta"):
        experts = UnfusedExperts(count, hidden, inner, names, activation, both.dtype)
    for index, expert in enumerate(experts):
        views = (both[index, :inner], both[index, inner:], down[index])
        for leaf, view in zip(names, views, strict=True):
            expert.get_submodule(leaf)._parameters["weight"] = nn.Parameter(view.detach(), requires_grad=False)
    experts.train(bank.training)
    return experts if both.is_meta or _agree(bank, experts, both) else None


def _agree(bank: Callable[..., Tensor], experts: UnfusedExperts, like: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x_NH = torch.randn(_TOKENS, experts.hidden, generator=generator).to(like)
    chosen_NK = torch.rand(_TOKENS, len(experts), generator=generator).argsort(1)[:, :2].to(like.device)
    weights_NK = torch.rand(chosen_NK.shape, generator=generator).to(like)
    expected_NH = bank(x_NH, chosen_NK, weights_NK).float()
    found_NH = experts(x_NH, chosen_NK, weights_NK).float()
    return bool((found_NH - expected_NH).abs().max() <= 0.01 * expected_NH.abs().max())


def _names_on_disk(model: PreTrainedModel, name: str, count: int) -> tuple[str, str, str] | None:
    """What a checkpoint calls gate, up and down of each expert: numbers are sent the way on which weights are saved."""
    from transformers.core_model_loading import revert_weight_conversion

    marks = torch.arange(3.0 * count).view(count, 3, 1)
    sent = {f"{name}.{_GATE_UP}": marks[:, :2].clone(), f"{name}.{_DOWN}": marks[:, 2:].clone()}
    names: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    arrived = revert_weight_conversion(model, sent)
    for key, tensor in arrived.items():
        found = re.search(r"\.experts\.(\d+)\.([^.]+)\.weight$", key)
        if found is None or tensor.numel() != 1 or int(tensor) // 3 != int(found[1]):
            return None
        names[int(tensor) % 3].add(found[2])
    if len(arrived) != 3 * count or any(len(each) != 1 for each in names.values()):
        return None
    gate, up, down = (each.pop() for each in names.values())
    return gate, up, down


def _activation(module: Any) -> str | None:
    """The name of an activation, if it is one that has no settings of its own."""
    kinds = {name: ACT2FN[name] for name in ACT2FN}
    return next(
        (name for name, kind in kinds.items() if type(kind) is type(module) and repr(kind) == repr(module)), None
    )
