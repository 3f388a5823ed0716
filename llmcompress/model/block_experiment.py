"""Experiments on one block: runs it with scaled outputs and records what every linear reads. N = tokens, I = inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcompress.model.skeleton import BlockCall

LINEARS = (nn.Linear, Conv1D)


@dataclass
class Observed:
    """What one forward of a block showed. Holding the tensors keeps their storage from being used again."""

    output: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Every executed tap's input, in order of execution."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """All arguments of the same taps."""
    wanted: frozenset[str] = frozenset()
    """Not empty: all that this forward is run for."""

    def rows_NI(self, name: str) -> Tensor | None:
        """The input of a tap as tokens × channels, or None where it was not executed."""
        found = self.inputs.get(name)
        return None if found is None else found.detach().reshape(-1, found.shape[-1])


class BlockExperiment:
    """A block with real weights and the arguments to call it with.

    Taps are the modules whose inputs are observed and whose outputs can be scaled: all linears and all norms.
    Scaling a linear's output by s is scaling its rows and its bias by s.
    """

    def __init__(self, block: nn.Module, call: BlockCall, hidden_BTD: Tensor) -> None:
        self.block, self.call, self.hidden = block, call, hidden_BTD
        self.linears = {name: module for name, module in block.named_modules() if isinstance(module, LINEARS)}
        self.norms = {name: module for name, module in block.named_modules() if is_norm_like(module)}

    @cached_property
    def base(self) -> Observed:
        """The forward with nothing changed."""
        return self.run()

    def run(
        self,
        scales: Mapping[str, Tensor] | None = None,
        *,
        masks: Mapping[str, Tensor] | None = None,
        until: Collection[str] = (),
    ) -> Observed:
        """One forward: outputs of the taps in `scales` are multiplied, inputs of those in `masks` too.

        With `until` the forward ends once the inputs of those taps were seen; the output is then meaningless.
        """
        observed = Observed(self.hidden, wanted=frozenset(until))
        with ExitStack() as stack:
            for name, module in {**self.linears, **self.norms}.items():
                stack.enter_context(_observe(observed, name, module, (masks or {}).get(name)))
                if scales and name in scales:
                    stack.enter_context(_scaled(module, scales[name]))
            with suppress(_SeenEnough):
                observed.output = self.call.run(self.block, self.hidden.clone())
        return observed


class _SeenEnough(Exception):
    """Ends a forward early; private, so it can hide no error of the model's."""


def is_norm_like(module: nn.Module) -> bool:
    """A leaf whose only parameters are a gain per channel and perhaps a bias per channel."""
    parameters = dict(module.named_parameters(recurse=False))
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    return (
        "weight" in parameters
        and set(parameters) <= {"weight", "bias"}
        and len(shapes) == 1
        and len(shapes.pop()) == 1
        and not any(module.children())
    )


def sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear, whichever way it stores its weight."""
    first, second = module.get_parameter("weight").shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


@contextmanager
def _observe(observed: Observed, name: str, module: nn.Module, mask: Tensor | None) -> Iterator[None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = args[0] if args else next(iter(kwargs.values()))
        observed.inputs[name] = value
        observed.calls[name] = (args, kwargs)
        if observed.wanted and observed.wanted <= observed.inputs.keys():
            raise _SeenEnough
        if mask is None:
            return None
        return ((value * mask, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value * mask})

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _scaled(module: nn.Module, scale: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: output * scale)
    try:
        yield
    finally:
        handle.remove()
