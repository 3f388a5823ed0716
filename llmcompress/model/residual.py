"""Finds by experiment where a model reads and writes its residual stream. D = width of the stream.

A parameter *reads* the stream if it multiplies a norm's output, and *writes* it if it produces what is added to the
stream. Both are statements about one axis of the parameter, for any module: a linear, a Conv1D, a router, an expert
bank, an embedding. They are tested by gradients that must be exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import CompressError
from llmcompress.model.norms import NormForm, norm_form, normalises


@dataclass(frozen=True)
class Port:
    """The axis of a parameter that reads or writes the stream."""

    parameter: str
    axis: int

    @property
    def owner(self) -> str:
        """The module that the parameter belongs to."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class StreamNorm:
    """A norm whose input is the stream itself, and the readers of its output."""

    name: str
    form: NormForm
    readers: tuple[Port, ...]
    stage: int
    """0: it reads the stream as it enters; 1: after the first additions; and so on."""


@dataclass(frozen=True)
class Writer:
    """Something that is added to the stream after the norms of its stage have read it."""

    port: Port
    stage: int


@dataclass(frozen=True)
class Ports:
    """All readers and writers of the stream in a block, or outside the blocks; names are relative to it."""

    norms: tuple[StreamNorm, ...]
    writers: tuple[Writer, ...]

    @property
    def stages(self) -> int:
        """How often the stream is added to before it is read again: 2 for attention then FFN, 1 for both at once."""
        return 1 + max(*(norm.stage for norm in self.norms), *(writer.stage for writer in self.writers))

    def readers(self) -> Iterator[Port]:
        """Of all norms."""
        return (port for norm in self.norms for port in norm.readers)


@dataclass(frozen=True)
class Residual:
    """The residual stream of a model: its width, its readers and writers."""

    width: int
    outside_blocks: Ports
    """Embeddings write; the readers of the one norm are the head, or a projection before it. Full names."""
    blocks: tuple[tuple[str, Ports], ...]
    """By the blocks' full names."""

    @property
    def centred(self) -> bool:
        """Whether the norms subtract the mean (LayerNorm): all of them do, or none."""
        return self.outside_blocks.norms[0].form.centred


@dataclass(frozen=True)
class StreamExperiment:
    """A network on random weights, run on one of two inputs."""

    name: str
    root: nn.Module
    run: Callable[[int], tuple[Tensor, Tensor]]
    """The stream as it enters, and what comes out: the stream again, or logits."""
    written: int
    """Which of the two the writers add to."""


def find_ports(experiment: StreamExperiment, width: int) -> Ports:
    """The experiments, the same for a block and for what stands around the blocks.

    Raises: CompressError, naming the module, where a change of basis could not be exact; NotReached when more tokens
    are needed.
    """
    parameters = {key: p for key, p in experiment.root.named_parameters() if width in p.shape and not p.is_meta}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    norms = _stream_norms(experiment, width)
    if not norms:
        raise refused(
            "no norm reads the residual stream: the model normalizes the outputs of its sublayers (post-norm)",
            experiment.name,
        )
    _expect_all_run(experiment, parameters)
    some_D = torch.zeros(width, dtype=torch.bool)
    some_D[torch.randperm(width, generator=torch.Generator().manual_seed(1))[: (width + 1) // 2]] = True
    writers, before = _writers(experiment, parameters, norms, some_D)
    stages = sorted(set(before.values()), key=len)
    if any(not small < large for small, large in pairwise(stages)):
        raise refused("its norms do not read the residual stream in sequence", experiment.name)
    rows = tuple(
        StreamNorm(
            name,
            _form(experiment, name, width),
            _readers(experiment, parameters, name, some_D),
            stages.index(before[name]),
        )
        for name in norms
    )
    first = {port: min(i for i, seen in enumerate([*stages, set(writers)]) if port in seen) - 1 for port in writers}
    return Ports(rows, tuple(Writer(port, stage) for port, stage in first.items()))


class NotReached(Exception):
    """Some parameter took no part in an experiment: an expert to which no token was sent."""


def _expect_all_run(experiment: StreamExperiment, parameters: Mapping[str, nn.Parameter]) -> None:
    with torch.enable_grad():
        reached = _gradients(torch.cat([part.flatten() for part in experiment.run(0)]), parameters)
    for key, parameter in parameters.items():
        if parameter.dim() >= 2 and key not in reached:
            raise NotReached(_full(experiment, key))


def _stream_norms(experiment: StreamExperiment, width: int) -> list[str]:
    """Norms whose input moves exactly as the stream does while no norm gives anything."""
    leaves = [name for name, module in experiment.root.named_modules() if not any(module.children())]
    with torch.no_grad(), _inputs(experiment, leaves) as entered, _outputs(experiment, leaves) as left:
        experiment.run(0)
        names = [
            name
            for name in left
            if name in entered and normalises(experiment.root.get_submodule(name), entered[name], left[name], width)
        ]
    streams, inputs = [], []
    for sample in range(2):
        with torch.no_grad(), _changed(experiment, names, torch.zeros_like), _inputs(experiment, names) as seen:
            streams.append(experiment.run(sample)[0])
        inputs.append(seen)
    moved = streams[1] - streams[0]
    return [name for name in names if _moves_with(inputs[1][name] - inputs[0][name], moved)]


def _moves_with(seen: Tensor, moved: Tensor) -> bool:
    """Some models flatten sequences before a norm."""
    return seen.numel() == moved.numel() and torch.allclose(seen.reshape(moved.shape), moved, atol=1e-4)


def _form(experiment: StreamExperiment, name: str, width: int) -> NormForm:
    form = norm_form(experiment.root.get_submodule(name), width)
    if form is None:
        raise refused("this norm is neither a LayerNorm nor an RMSNorm", _full(experiment, name))
    return form


def _writers(
    experiment: StreamExperiment, parameters: Mapping[str, nn.Parameter], norms: Sequence[str], some_D: Tensor
) -> tuple[list[Port], dict[str, frozenset[Port]]]:
    """What writes the stream; and for every norm those that have written when it reads.

    While nothing flows back through the norms, a writer's gradient is zero outside of the channels that are looked at.
    """
    with torch.enable_grad(), _changed(experiment, norms, Tensor.detach), _inputs(experiment, norms) as seen:
        written = experiment.run(0)[experiment.written]
        writers = _zero_outside(_gradients(written[..., some_D], parameters), some_D)
        before = {}
        for name in norms:
            reaches = _gradients(seen[name][..., some_D], parameters)
            before[name] = frozenset(port for port in writers if port.parameter in reaches)
    matrices = {port.owner for port in writers if parameters[port.parameter].dim() >= 2}
    for port in writers:
        if port.owner not in matrices:
            raise refused(
                "this module scales individual channels of what is added to the residual stream",
                _full(experiment, port.parameter),
            )
    return writers, before


def _readers(
    experiment: StreamExperiment, parameters: Mapping[str, nn.Parameter], norm: str, some_D: Tensor
) -> tuple[Port, ...]:
    """Parameters whose gradient is zero exactly on the channels that the norm does not give."""
    others = {key: p for key, p in parameters.items() if key.rpartition(".")[0] != norm}
    with torch.enable_grad(), _changed(experiment, [norm], lambda y: y * some_D):
        readers = _zero_outside(_gradients(experiment.run(0)[1], others), some_D)
    for port in readers:
        if others[port.parameter].dim() < 2:
            raise refused(
                "this module multiplies individual channels of a norm's output", _full(experiment, port.parameter)
            )
    return tuple(readers)


def _gradients(values: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of a random combination of the values; only those that are not zero throughout."""
    if not values.requires_grad:
        return {}
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((values * weights).sum(), [*parameters.values()], allow_unused=True, retain_graph=True)
    return {key: g for key, g in zip(parameters, found, strict=True) if g is not None and bool(g.any())}


def _zero_outside(gradients: Mapping[str, Tensor], some_D: Tensor) -> list[Port]:
    """Axes along which a gradient is zero on all other channels, and on most of these is not."""
    ports = []
    for key, gradient in gradients.items():
        for axis, size in enumerate(gradient.shape):
            if size == len(some_D):
                alive_D = gradient.movedim(axis, 0).flatten(1).any(1) if gradient.dim() > 1 else gradient != 0
                if not alive_D[~some_D].any() and alive_D[some_D].float().mean() > 0.5:
                    ports.append(Port(key, axis))
    return ports


@contextmanager
def _changed(experiment: StreamExperiment, names: Iterable[str], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The outputs of these modules changed."""
    with ExitStack() as stack:
        for name in names:
            module = experiment.root.get_submodule(name)
            stack.callback(module.register_forward_hook(lambda _, __, output: change(output)).remove)
        yield


@contextmanager
def _outputs(experiment: StreamExperiment, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of these modules, by name."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        return note

    with ExitStack() as stack:
        for name in names:
            stack.callback(experiment.root.get_submodule(name).register_forward_hook(see(name)).remove)
        yield seen


@contextmanager
def _inputs(experiment: StreamExperiment, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The inputs of these modules, by name."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen[name] = args[0]

        return note

    with ExitStack() as stack:
        for name in names:
            stack.callback(experiment.root.get_submodule(name).register_forward_pre_hook(see(name)).remove)
        yield seen


def refused(why: str, where: str) -> CompressError:
    """The error for a model whose stream cannot be given another basis."""
    return CompressError(
        "residual.no-other-basis",
        f"the residual stream of this model cannot be rotated: {why}",
        where=where,
        fix="use another method: `depth` removes blocks, `width` removes FFN channels and heads",
    )


def _full(experiment: StreamExperiment, name: str) -> str:
    return f"{experiment.name}.{name}" if experiment.name else name
