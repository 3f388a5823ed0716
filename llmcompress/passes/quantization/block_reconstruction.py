"""Runs the part of a block around some linears with quantized stand-ins, to compare candidates. C = input channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.rounded_inputs import fixed_scale
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments by position and by name."""


@dataclass(frozen=True)
class Rearranged:
    """A shared input, shifted and divided channel by channel before it is quantized."""

    shift_C: Tensor
    divide_C: Tensor
    largest: Tensor
    """Magnitude of all that calibration saw, after that: the range of static activations."""


class Reconstruction:
    """The module that encloses the linears that share an input, with the arguments of a few calibration batches."""

    def __init__(self, block: nn.Module, name: str, calls: Sequence[Call], readers: Sequence[LinearSite]) -> None:
        self._block, self._name, self._calls, self._readers = block, name, calls, readers
        self._weights = [(site, site.weight_OI, site.bias_O) for site in readers]
        self._expected = self._outputs()

    @property
    def signal(self) -> float:
        """Sum of the squared outputs."""
        return sum(float(output.square().sum(dtype=torch.float64)) for output in self._expected)

    def error(self, schemes: Sequence[Scheme], rearranged: Rearranged) -> float:
        """Sum of squared differences of the output when weights and inputs of the linears are rounded."""
        with self._rounded(schemes, rearranged):
            pairs = zip(self._outputs(), self._expected, strict=True)
            return sum(float((output - expected).square().sum(dtype=torch.float64)) for output, expected in pairs)

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        module = self._block.get_submodule(self._name)  # where it is a reader itself, what stands there now
        return [_first(module(*args, **kwargs)) for args, kwargs in self._calls]

    @contextmanager
    def _rounded(self, schemes: Sequence[Scheme], rearranged: Rearranged) -> Iterator[None]:
        before = [site.module for site in self._readers]
        try:
            for (site, weight_OC, bias_O), scheme in zip(self._weights, schemes, strict=True):
                moved_O = weight_OC @ rearranged.shift_C
                linear = _quantized(
                    weight_OC * rearranged.divide_C,
                    None if bias_O is None else bias_O + moved_O,
                    scheme,
                    rearranged.largest,
                    site.storage_dtype,
                )
                site.replace(_StandIn(linear, rearranged))
            yield
        finally:
            for site, module in zip(self._readers, before, strict=True):
                site.replace(module)


def reconstruction_of(
    block: BlockWork, readers: Sequence[LinearSite], *, enclosed: bool, batches: int
) -> Reconstruction:
    """For linears that share an input: the module around them; with `enclosed` false the linear alone, if it is one.

    A single linear's module is the one it stands in (the fused projection's attention), unless that is the block.
    """
    names = [site.info.name for site in readers]
    name = _common(names) if len(names) > 1 else names[0].rpartition(".")[0] or names[0]
    if len(names) == 1 and not enclosed:
        name = names[0]
    calls = calls_of(block, block.module.get_submodule(name), readers[0], batches=batches)
    return Reconstruction(block.module, name, calls, readers)


def calls_of(block: BlockWork, module: nn.Module, reader: LinearSite, *, batches: int) -> list[Call]:
    """With what the block calls a module that stands around a linear, or is it."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(calls) < batches:
            calls.append((args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        block.watch(reader.module, lambda _: None)
    finally:
        handle.remove()
    return calls


@torch.no_grad()
def observed(block: BlockWork, reader: LinearSite, call: Call) -> tuple[Tensor, Tensor]:
    """What a linear is given in one call of the block, and what the block makes of it."""
    seen: list[Tensor] = []
    handle = reader.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        output = _first(block.module(*call[0], **call[1]))
    finally:
        handle.remove()
    return seen[0], output


class _StandIn(nn.Module):
    def __init__(self, linear: QuantLinear, rearranged: Rearranged) -> None:
        super().__init__()
        self.linear, self._rearranged = linear, rearranged

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear((x - self._rearranged.shift_C) / self._rearranged.divide_C)
        return out


def _quantized(
    weight_OC: Tensor, bias_O: Tensor | None, scheme: Scheme, largest: Tensor, scale_dtype: torch.dtype
) -> QuantLinear:
    fitted = fit(weight_OC, scheme.weights, scale_dtype=scale_dtype)
    scale = fixed_scale(largest, scheme) if scheme.measures_inputs else None
    return QuantLinear.from_fitted(scheme, round_to_codes(weight_OC, fitted), fitted, bias_O, scale)


def _common(names: Sequence[str]) -> str:
    """The longest name that all of them begin with, by whole words; empty: the block itself."""
    shared = []
    for words in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)


def _first(output: Any) -> Tensor:
    tensor = output if isinstance(output, Tensor) else output[0]
    assert isinstance(tensor, Tensor)
    return tensor
