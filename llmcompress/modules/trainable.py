"""Trainable twins of modules that consist of ordinary tensors, or of parts with twins."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import CompressedModule, TrainableTwin
from llmcompress.modules.trainable_roles import Role, TrainableRoles


class TwinOfParts(TrainableTwin):
    """Runs the module's own code with its own parameters; compressed parts are replaced by their twins.

    `roles` gives the role of the matrices of individual children; the others have the caller's role. Children in
    `frozen` do not change.
    """

    def __init__(
        self,
        module: CompressedModule,
        wanted: TrainableRoles,
        *,
        roles: Mapping[str, Role] | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__(module)
        self.form = sharing_tensors(module)
        self._required = {name: each.requires_grad for name, each in module.named_parameters()}
        for name, part in self.form.named_children():
            here = wanted.with_matrices_as((roles or {}).get(name, wanted.matrices))
            if name in frozen:
                continue
            if isinstance(part, CompressedModule):
                setattr(self.form, name, part.trainable(here))
            else:
                self._take(f"{name}.", part, here)
        self._take("", self.form, wanted, recurse=False)

    def _take(self, prefix: str, owner: nn.Module, wanted: TrainableRoles, *, recurse: bool = True) -> None:
        """Give the module parameters of its own, those that are wanted with gradients."""
        for name, first in list(owner.named_parameters(recurse=recurse)):
            role: Role = "biases" if name.rpartition(".")[2] == "bias" else wanted.matrices
            _put(owner, name, nn.Parameter(first.detach().clone(), requires_grad=role in wanted))
            if role in wanted:
                self.roles[f"form.{prefix}{name}"] = role

    @override
    def compressed(self) -> CompressedModule:
        made = sharing_tensors(self.form)
        for name, part in self.form.named_children():
            if isinstance(part, TrainableTwin):
                setattr(made, name, part.compressed())
        for name, parameter in _own_parameters(self.form):
            _put(made, name, nn.Parameter(parameter.detach().clone(), requires_grad=self._required[name]))
        return made.train(self.training)

    @override
    def dense_weight(self) -> Tensor:
        return self.form.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear it replaces."""
        return self.form.dense_bias()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with these numbers."""
        return self.form(*args, **kwargs)


def sharing_tensors(module: CompressedModule) -> CompressedModule:
    """A copy of the modules, holding the very same tensors, and the same twins."""
    twins = [each for each in module.modules() if isinstance(each, TrainableTwin)]
    return copy.deepcopy(module, {id(each): each for each in (*module.parameters(), *module.buffers(), *twins)})


def _own_parameters(form: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Without those of compressed parts and of twins."""
    for name, parameter in form.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, part in form.named_children():
        if not isinstance(part, CompressedModule | TrainableTwin):
            yield from _own_parameters(part, f"{prefix}{name}.")


def _put(owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    owner.get_submodule(path)._parameters[leaf] = parameter
