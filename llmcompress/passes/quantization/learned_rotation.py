"""Learns the rotation of the residual stream that minimizes the loss of the quantized model.

D = width of the stream, K = its dimensions: D, or D - 1 where norms subtract the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.residual import Residual
from llmcompress.model.rotation import places
from llmcompress.model.site import LinearSite
from llmcompress.modules.rounded_inputs import fixed_scale, round_inputs
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.modules.transformed_input import unwrapped
from llmcompress.numerics.basis import zero_mean_frame
from llmcompress.numerics.fake_quant import passing
from llmcompress.numerics.grid import restore, round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.training.data.base import Windows, held_out
from llmcompress.training.job import Callback, Job
from llmcompress.training.loop import train
from llmcompress.training.settings import Training

_LOOKS = 5
"""How often during a training the rounded model is measured; the best basis seen stays."""


class LearnedRotation(Training):
    """Training settings of the rotation; weights are quantized to `scheme`, activations too if the scheme has them."""

    scheme: str = "int4_channel_a8token"
    """What the basis is to be good for; static activation scales are those of the batch at hand."""
    learning_rate: float = Field(default=0.003, gt=0)
    """Highest angle of a step."""
    batch: int = Field(default=4, ge=1)
    """Windows that go through the model together."""
    validation: float = Field(default=0.25, ge=0, le=0.5)
    """Share of the windows that only choose between the bases seen; 0: all windows teach and choose."""

    @field_validator("scheme")
    @classmethod
    def _known(cls, name: str) -> str:
        return named_scheme(name).name


@dataclass(frozen=True)
class Learned:
    """The best rotation, and the validation loss of the quantized model with it and with the initial one."""

    kept_DK: Tensor
    loss: float
    loss_at_start: float


def learn(
    whole: WholeModel, residual: Residual, kept_DK: Tensor, sites: Sequence[LinearSite], settings: LearnedRotation
) -> Learned:
    """Turn the basis so that the rounded model's loss on the calibration windows falls; the model is as it was after.

    The turn is Cayley's map of a skew matrix that begins at zero; gradients pass through the rounding unchanged.

    Source: Liu et al. (SpinQuant), arXiv 2405.16406. Differs: AdamW on the skew matrix in the place of SGD on the
    manifold; of the bases seen the one that is best on windows kept apart stays, the first one among them.
    """
    scheme = named_scheme(settings.scheme)
    windows_NT = whole.context.windows_NT
    taught, chosen = held_out(len(windows_NT), share=settings.validation, seed=whole.context.seed)
    taught_NT = windows_NT[taught]
    chosen_NT = windows_NT[chosen] if len(chosen) else taught_NT
    with whole.resident() as model:
        turn = _Turn(kept_DK.to(whole.context.device), centred=residual.centred)
        with _turning(model, residual, turn), _rounding(sites, scheme):
            first = _loss(whole, chosen_NT)
            best = _Best(first, turn.angles, partial(_loss, whole, chosen_NT), settings.steps)
            job = Job("rotation", parameters=[turn.angles], callback=best)
            plain = settings.model_copy(update={"validation": 0.0})
            train(model, Windows(taught_NT), plain, whole.context, job=job)
        with torch.no_grad():
            turn.angles.copy_(best.angles)
            found_DK = (kept_DK.to(whole.context.device) @ turn.turn().double()).to(kept_DK.device)
    # what float32 leaves of orthogonality is repaired in float64
    basis_DK, triangle_KK = torch.linalg.qr(found_DK)
    return Learned(basis_DK * triangle_KK.diagonal().sign(), best.loss, first)


class _Best(Callback):
    """The best angles so far."""

    def __init__(self, loss: float, trained: nn.Parameter, measure: Callable[[], float], steps: int) -> None:
        self.loss, self.angles = loss, trained.detach().clone()
        self._trained, self._measure, self._steps = trained, measure, steps

    @override
    def after_step(self, step: int) -> bool:
        if step % max(1, self._steps // _LOOKS) == 0 or step == self._steps:
            loss = self._measure()
            if loss < self.loss:
                self.loss, self.angles = loss, self._trained.detach().clone()
        return False

    @override
    def state(self) -> dict[str, Tensor]:
        return {"loss": torch.tensor(self.loss, dtype=torch.float64), "angles": self.angles}

    @override
    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.loss, self.angles = float(state["loss"]), state["angles"].to(self.angles.device)


@torch.no_grad()
def _loss(whole: WholeModel, windows_NT: Tensor) -> float:
    return sum(float(whole.loss(ids_BT)) * len(ids_BT) for ids_BT in whole.batches(windows_NT)) / len(windows_NT)


class _Turn(nn.Module):
    """The basis as a function of angles; computed once per forward."""

    def __init__(self, kept_DK: Tensor, *, centred: bool) -> None:
        super().__init__()
        width, count = kept_DK.shape
        self.kept_DK = kept_DK.float()
        self.place_KD = zero_mean_frame(width).to(self.kept_DK) if centred else None
        self.above = torch.triu_indices(count, count, 1, device=kept_DK.device)
        self.angles = nn.Parameter(kept_DK.new_zeros(self.above.shape[1], dtype=torch.float32))
        self.refresh()

    def turn(self) -> Tensor:
        """K×K, orthogonal: (1 - A)⁻¹ (1 + A) of the skew matrix A."""
        count = self.kept_DK.shape[1]
        upper_KK = self.angles.new_zeros(count, count).index_put((self.above[0], self.above[1]), self.angles)
        skew_KK = upper_KK - upper_KK.T
        one_KK = torch.eye(count, device=skew_KK.device)
        turned: Tensor = torch.linalg.solve(one_KK - skew_KK, one_KK + skew_KK)
        return turned

    def refresh(self) -> None:
        """Compute the matrices by which writers and readers are multiplied."""
        basis = self.kept_DK @ self.turn()
        self.write = basis if self.place_KD is None else basis @ self.place_KD
        self.read = self.write if self.place_KD is None else self.write + 1 / len(basis)


class _Along(nn.Module):
    """A parametrization: the parameter rotated along one axis."""

    def __init__(self, turn: _Turn, axis: int, *, reads: bool) -> None:
        super().__init__()
        self._turn, self.axis, self.reads = [turn], axis, reads  # in a list: no part of the model

    def forward(self, weight: Tensor) -> Tensor:
        matrix = self._turn[0].read if self.reads else self._turn[0].write
        return (weight.movedim(self.axis, -1) @ matrix).movedim(-1, self.axis)


class _Rounded(nn.Module):
    """A parametrization: the fake-quantized weight; gradients pass straight through."""

    def __init__(self, scheme: Scheme, *, transposed: bool) -> None:
        super().__init__()
        self.scheme, self.transposed = scheme, transposed

    def forward(self, weight: Tensor) -> Tensor:
        return passing(self._rounded, weight)

    def _rounded(self, weight: Tensor) -> Tensor:
        weight_OI = weight.T if self.transposed else weight
        fitted = fit(weight_OI, self.scheme.weights)
        restored_OI = restore(round_to_codes(weight_OI, fitted), fitted)
        return restored_OI.T if self.transposed else restored_OI


@contextmanager
def _turning(model: nn.Module, residual: Residual, turn: _Turn) -> Iterator[None]:
    """All parameters that meet the stream follow the turn, for as long as the context lasts."""
    ports = [
        (prefix + port.parameter, port.axis, reads)
        for prefix, around in places(residual)
        for found, reads in ((around.readers(), True), ((writer.port for writer in around.writers), False))
        for port in found
    ]
    with ExitStack() as stack:
        for name, axis, reads in ports:
            owner, _, leaf = name.rpartition(".")
            stack.enter_context(_parametrized(model.get_submodule(owner), leaf, _Along(turn, axis, reads=reads)))
        stack.callback(model.register_forward_pre_hook(lambda *_: turn.refresh()).remove)
        yield


@contextmanager
def _rounding(sites: Sequence[LinearSite], scheme: Scheme) -> Iterator[None]:
    """All linears of the blocks that the scheme can round are rounded, and their inputs."""
    with ExitStack() as stack:
        for site in sites:
            linear = unwrapped(site.module)
            group = scheme.weights.group
            if not isinstance(linear, nn.Linear | Conv1D) or (group and site.info.inputs % group):
                continue
            rounded = _Rounded(scheme, transposed=isinstance(linear, Conv1D))
            stack.enter_context(_parametrized(linear, "weight", rounded))
            if scheme.activations:
                stack.callback(linear.register_forward_pre_hook(partial(_round_input, scheme)).remove)
        yield


def _round_input(scheme: Scheme, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    scale = fixed_scale(args[0].detach().abs().max(), scheme) if scheme.measures_inputs else None
    return (round_inputs(args[0], scheme, scale), *args[1:])


@contextmanager
def _parametrized(owner: nn.Module, leaf: str, change: nn.Module) -> Iterator[None]:
    """The first to enter for a tensor is the last to leave, and then puts the tensor back as it was."""
    first = not parametrize.is_parametrized(owner, leaf)
    parametrize.register_parametrization(owner, leaf, change, unsafe=True)
    try:
        yield
    finally:
        if first:
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
