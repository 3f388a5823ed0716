"""The trainable form of a compressed model, within a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from llmcompress.errors import CompressError
from llmcompress.model.skeleton import put_module
from llmcompress.modules.base import CompressedModule, TrainableTwin
from llmcompress.modules.trainable_roles import Role, TrainableRoles


@contextmanager
def trainable_form(
    model: nn.Module, wanted: TrainableRoles, *, only: Callable[[str], bool] = lambda _: True
) -> Iterator[dict[Role, list[nn.Parameter]]]:
    """Every compressed module with a name that `only` takes is replaced by its twin; their parameters, by role.

    When the context ends, modules that compute exactly what the twins did last take their place. After an exception
    the modules that were there before do. The twins' own zeros stay as `wanted` says: a training that also freezes
    exact zeros of its parameters (`ZerosStay`) would freeze every weight that was rounded to zero.

    Raises: CompressError for a module that has no trainable form.
    """
    before = {name: module for name, module in _compressed(model) if only(name)}
    try:
        twins = {name: _twin(name, module, wanted) for name, module in before.items()}
        _put(model, twins)
        found: dict[Role, list[nn.Parameter]] = {}
        for twin in twins.values():
            for role, parameter in twin.trained():
                found.setdefault(role, []).append(parameter)
        yield found
        after = {name: twin.compressed() for name, twin in twins.items()}
    except BaseException:
        _put(model, before)
        raise
    _put(model, after)


def _compressed(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, CompressedModule]]:
    """The outermost compressed modules that are no mere frames, with their names."""
    for name, module in model.named_children():
        if isinstance(module, CompressedModule) and not module.frame:
            yield prefix + name, module
        else:
            yield from _compressed(module, f"{prefix}{name}.")


def _twin(name: str, module: CompressedModule, wanted: TrainableRoles) -> TrainableTwin:
    try:
        return module.trainable(wanted)
    except CompressError as error:
        raise CompressError(error.code, error.what, where=name, fix=error.fix) from error


def _put(model: nn.Module, modules: dict[str, CompressedModule] | dict[str, TrainableTwin]) -> None:
    """Put the modules in place, and let those that hold on to others find them again."""
    for name, module in modules.items():
        put_module(model, name, module)
    for part in model.modules():
        if isinstance(part, CompressedModule):
            part.connect(model)


def norm_weights(model: nn.Module) -> list[nn.Parameter]:
    """Every vector of the model that belongs to no matrix: weights and biases of norms."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not isinstance(module, TrainableTwin) and all(each.dim() == 1 for each in own):
            found += own
    return list(dict.fromkeys(found))
