"""One gradient sweep through the whole model for any number of observers. O = outputs, U = units.

It holds little beside the weights: blocks are computed again when their gradients are due, logits exist for a few rows
at a time, and a weight's gradient goes as soon as the observers have taken it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.measurement_cache import CachedMeasurements
from llmcompress.calibration.offloading import give_back_freed_memory
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.model.skeleton import find_blocks
from llmcompress.model.units import UnitGroup, masked
from llmcompress.training import head
from llmcompress.training.data.batch import Sample, padded
from llmcompress.training.objectives.base import ObjectiveInputs
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.step import checkpointed_blocks


class GradientObserver(ABC):
    """Something accumulated from gradients of the loss, batch by batch."""

    @property
    def one_by_one(self) -> bool:
        """Whether it needs the gradients of every single window, not sums over batches."""
        return False

    def recall(self, cached: CachedMeasurements) -> bool:
        """Take cached results; returns whether nothing is missing."""
        return False

    def keep(self, cached: CachedMeasurements) -> None:  # noqa: B027 (most are too large to be kept)
        """Cache the results."""

    @abstractmethod
    def attached(self, whole: WholeModel, model: nn.Module) -> AbstractContextManager[None]:
        """Attaches hooks and enables gradients of parameters for the whole sweep."""

    def during_batch(self, model: nn.Module) -> AbstractContextManager[None]:
        """Entered for every batch, forward and backward."""
        return nullcontext()

    def collect(self) -> None:  # noqa: B027 (hooks have heard already)
        """Called after the backward pass of a batch: accumulate its gradients."""


def sweep(whole: WholeModel, observers: Sequence[GradientObserver]) -> None:
    """All windows forward and back once; twice where some observers want single windows and others do not.

    The loss is summed over the windows of a batch, so that gradients do not depend on how windows are batched.
    """
    cached = whole.context.cached_measurements()
    missing = [each for each in observers if cached is None or not each.recall(cached)]
    for one_by_one in (False, True):
        of_kind = [each for each in missing if each.one_by_one is one_by_one]
        if of_kind:
            _sweep(whole, of_kind, one_by_one=one_by_one)
    if cached:
        for each in missing:
            each.keep(cached)


def rows_at_once(vocabulary: int) -> int:
    """How many rows have their logits at once: fewer than in a training, where they are not the largest thing."""
    return max(_FEWEST_ROWS, head.rows_at_once(vocabulary) // 8)


_FEWEST_ROWS = 64


def _sweep(whole: WholeModel, observers: Sequence[GradientObserver], *, one_by_one: bool) -> None:
    windows_NT = whole.context.windows_NT
    with whole.resident() as model, ExitStack() as attached:
        model.requires_grad_(False)
        rows = rows_at_once(model.config.get_text_config().vocab_size)
        together = windows_NT[: 1 if one_by_one else whole.context.batch].to(whole.context.device)
        found = head.find_head(model, together) if together.numel() > rows else None
        for each in observers:
            attached.enter_context(each.attached(whole, model))
        for parameter in model.parameters():
            if parameter.requires_grad:  # behind the observers' own hooks
                attached.callback(parameter.register_post_accumulate_grad_hook(_freed).remove)
        parts = [*(block for _, block in find_blocks(model)), *([found.module] if found else [])]
        batches = torch.split(windows_NT, 1) if one_by_one else whole.batches()
        done = 0
        for ids_BT in batches:
            with torch.enable_grad(), ExitStack() as around:
                for each in observers:
                    around.enter_context(each.during_batch(model))
                around.enter_context(checkpointed_blocks(model, True))
                around.enter_context(_giving_back(parts))
                summed_loss(model, ids_BT.to(whole.context.device), found, rows).backward()  # type: ignore[no-untyped-call]
            for each in observers:
                each.collect()
            done += len(ids_BT)
            whole.context.progress.substep("gradients", done=done, total=len(windows_NT))


def summed_loss(model: PreTrainedModel, ids_BT: Tensor, found: head.Head | None, rows: int) -> Tensor:
    """Mean loss of a token, summed over windows; logits for so many rows at a time where the head is known by itself,
    else for all."""
    batch = padded([Sample(ids_T) for ids_T in ids_BT]).to(ids_BT.device)
    predicted = head.predictions(model, batch, found)
    given = ObjectiveInputs(0, batch, predicted, None, rows if found else batch.ids_BT.numel())
    return CrossEntropy().loss(given) * len(ids_BT)


def _freed(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _giving_back(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Behind every module: states that are kept between what it freed would else hold all of that in the process."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(_hooked(module.register_forward_hook(lambda *_: give_back_freed_memory())))
        yield


class OutputSquares(GradientObserver):
    """Per site and output channel: the sum over tokens of the squared gradient of the loss of their window.

    Zeros where none came.
    """

    _NAME = "squared gradients of outputs"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.sums: dict[str, Tensor] = {}

    @override
    def recall(self, cached: CachedMeasurements) -> bool:
        known = {name: cached.find(Tensor, self._NAME, name) for name in self.names}
        self.sums = {name: sum_O for name, sum_O in known.items() if sum_O is not None}
        return len(self.sums) == len(self.names)

    @override
    def keep(self, cached: CachedMeasurements) -> None:
        for name, sum_O in self.sums.items():
            cached.put(sum_O, self._NAME, name)

    @override
    @contextmanager
    def attached(self, whole: WholeModel, model: nn.Module) -> Iterator[None]:
        missing = set(self.names) - self.sums.keys()
        with ExitStack() as hooks:
            hooks.enter_context(_needing_gradient(whole.model.get_input_embeddings()))
            for site in whole.sites():
                if site.name in missing:
                    self.sums[site.name] = torch.zeros(site.info.outputs, device=whole.context.device)
                    hooks.enter_context(_gradients_of(site.module, self.sums[site.name]))
            yield


class WeightGradients(GradientObserver):
    """Per site, of its weight as the module stores it: the sum of gradients over all windows, and that of their
    squares window by window; each takes as much memory as the weights, the gradients themselves that of one weight."""

    def __init__(self, names: Sequence[str], *, sums: bool = True, squares: bool = False) -> None:
        self.names, self._wants_sums, self._wants_squares = tuple(names), sums, squares
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.windows = 1
        """How many were seen, to make means of sums; one where there were none."""

    @property
    @override
    def one_by_one(self) -> bool:
        return self._wants_squares

    @override
    @contextmanager
    def attached(self, whole: WholeModel, model: nn.Module) -> Iterator[None]:
        self.windows = max(len(whole.context.windows_NT), 1)
        with ExitStack() as hooks:
            for name in self.names:
                weight = model.get_submodule(name).get_parameter("weight")
                weight.requires_grad_(True)
                if self._wants_sums:
                    self.sums[name] = torch.zeros_like(weight, requires_grad=False)
                if self._wants_squares:
                    self.squares[name] = torch.zeros_like(weight, requires_grad=False)
                handle = weight.register_post_accumulate_grad_hook(partial(self._take, name))  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
            yield

    def _take(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        if self._wants_sums:
            self.sums[name] += weight.grad
        if self._wants_squares:
            self.squares[name] += weight.grad.square()


class UnitMasks(GradientObserver):
    """The gradient of the loss in every unit's mask at 1, window by window.

    A unit's mask multiplies what its readers see of it, so this is the sum of activation × gradient over the unit.
    """

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        self.groups = tuple(groups)
        self.windows: list[list[Tensor]] = []
        """For every window a gradient per group, U."""
        self._masks: list[Tensor] = []
        self._device = torch.device("cpu")

    @property
    @override
    def one_by_one(self) -> bool:
        return True

    @override
    @contextmanager
    def attached(self, whole: WholeModel, model: nn.Module) -> Iterator[None]:
        self._device = whole.context.device
        yield

    @override
    @contextmanager
    def during_batch(self, model: nn.Module) -> Iterator[None]:
        self._masks = [torch.ones(group.units, device=self._device, requires_grad=True) for group in self.groups]
        with masked(model, self.groups, self._masks):
            yield

    @override
    def collect(self) -> None:
        self.windows.append(
            [mask_U.grad if mask_U.grad is not None else torch.zeros_like(mask_U).detach() for mask_U in self._masks]
        )
        self._masks = []

    def stacked(self, group: int) -> Tensor:
        """Of one group, windows × units, in float64 on the CPU."""
        return torch.stack([each[group] for each in self.windows]).double().cpu()


def squared_gradients(whole: WholeModel, names: Sequence[str]) -> dict[str, Tensor]:
    """What `OutputSquares` finds for these sites, by name."""
    observer = OutputSquares(names)
    sweep(whole, [observer])
    return observer.sums


def oriented(site: LinearSite, like_weight: Tensor) -> Tensor:
    """Something of the shape in which the module stores its weight → O×I."""
    return like_weight.T if site.info.transposed else like_weight


@contextmanager
def _gradients_of(module: nn.Module, sum_O: Tensor) -> Iterator[None]:
    """Add the squares of the gradients of the module's output to `sum_O`."""

    def add(gradient: Tensor) -> None:
        sum_O.add_(gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0))

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    with _hooked(module.register_forward_hook(watch)):
        yield


@contextmanager
def _needing_gradient(embedding: nn.Module) -> Iterator[None]:
    """Let gradients reach every block although no parameter wants one."""

    def ask(_: nn.Module, __: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    with _hooked(embedding.register_forward_hook(ask)):
        yield


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
