"""The one training loop: AdamW on the next-token loss, on a few windows, for the passes that must train.

B = windows of a batch, T = tokens, N = windows, V = vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.numerics.loss import in_batches, next_token_loss
from llmcompress.progress import Progress, Silent
from llmcompress.training.batches import Batches, held_out
from llmcompress.training.checkpoint import Checkpoint, Reached, load_state, save_state
from llmcompress.training.masks import Masks, ZerosStay
from llmcompress.training.optimizer import ParameterGroup, optimizer_groups, schedule
from llmcompress.training.settings import Training


@dataclass(frozen=True)
class Forward:
    """What an additional loss sees of a batch: logits are those of the model, with their graph."""

    step: int
    """1, 2, …"""
    ids_BT: Tensor
    logits_BTV: Tensor


ExtraLoss = Callable[[Forward], Tensor]
AfterStep = Callable[[int], bool | None]
"""Called with the number of the finished step; True ends the training."""


@dataclass(frozen=True)
class TrainingReport:
    """What happened."""

    losses: tuple[float, ...]
    """The loss that was minimised, before each step."""
    tokens: int
    """Tokens predicted, repeated ones counted again."""
    validation_before: float | None = None
    """Mean next-token loss on the windows that were kept out."""
    validation_after: float | None = None

    @property
    def steps(self) -> int:
        """How many were made; fewer than asked for when `after_step` ended the training."""
        return len(self.losses)


def train(
    model: PreTrainedModel,
    windows_NT: Tensor,
    settings: Training,
    *,
    device: torch.device,
    progress: Progress | None = None,
    seed: int = 0,
    parameters: Sequence[nn.Parameter | ParameterGroup] | None = None,
    extra_loss: ExtraLoss | None = None,
    after_step: AfterStep | None = None,
    masks: Masks | None = None,
    checkpoint: Checkpoint | None = None,
    start: int = 0,
    title: str = "train",
) -> TrainingReport:
    """Train in place; the model must be on the device in float32, in the mode (`eval`: no dropout) it shall train in.

    Without `parameters` everything is trained. Exact zeros of matrices stay exact zeros, unless other `masks` are
    given. The same seed gives the same weights, also when killed and resumed from a `checkpoint`. With `start` the
    first steps are skipped: batches and learning rates are those of the steps after it.

    Raises: CompressError when the loss or its gradient is no longer finite.
    """
    progress = progress or Silent()
    groups = optimizer_groups(model, parameters, settings)
    trained = [each for group in groups for each in group["params"]]
    training_NT, validation_NT = held_out(windows_NT, share=settings.validation, seed=seed)
    batches = Batches(training_NT, batch=settings.batch, seed=seed)
    accelerator = Accelerator(device_placement=False, mixed_precision="no")
    plain = AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    set_rates = schedule(plain, settings)
    optimizer: Optimizer = accelerator.prepare(plain)
    masks = masks or ZerosStay(trained)
    pieces, losses = settings.gradient_accumulation, list[float]()
    began = time.monotonic()
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with _trainable(model, trained), random, torch.enable_grad():
        before = _validation_loss(model, validation_NT, settings, device)
        torch.manual_seed(seed)
        fingerprint = _fingerprint(settings, seed, start, windows_NT, trained)
        reached = None
        if checkpoint:
            reached = load_state(checkpoint.path, trained, optimizer, masks, device=device, fingerprint=fingerprint)
        reached = reached or Reached(start, (), finished=False)
        losses += reached.losses
        for step in range(reached.step + 1, 1 if reached.finished else settings.steps + 1):
            loss = 0.0
            for micro in range(pieces):
                for ids_BT, weight in _parts(model, batches[(step - 1) * pieces + micro], settings.batch):
                    part = _loss(model, ids_BT.to(device), step, settings, extra_loss) * (weight / pieces)
                    accelerator.backward(part)
                    loss += float(part.detach())
            masks.before_step(step, optimizer)
            norm = float(accelerator.clip_grad_norm_(trained, settings.max_grad_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _diverged(step, loss, norm, settings)
            set_rates(step)
            optimizer.step()
            optimizer.zero_grad()
            masks.after_step(step, optimizer)
            losses.append(loss)
            left = (time.monotonic() - began) / (step - reached.step) * (settings.steps - step)
            progress.inside(f"{title}: step {step}/{settings.steps}, loss {loss:.3f}, {left:.0f} s left")
            stop = bool(after_step and after_step(step))
            finished = stop or step == settings.steps
            if checkpoint and (finished or step % checkpoint.every == 0):
                save_state(
                    checkpoint.path,
                    Reached(step, tuple(losses), finished),
                    trained,
                    optimizer,
                    masks,
                    device=device,
                    fingerprint=fingerprint,
                )
            if stop:
                break
        after = _validation_loss(model, validation_NT, settings, device)
    windows = len(losses) * settings.gradient_accumulation * settings.batch
    return TrainingReport(tuple(losses), windows * (windows_NT.shape[1] - 1), before, after)


def _parts(model: PreTrainedModel, ids_NT: Tensor, batch: int) -> Iterator[tuple[Tensor, float]]:
    """Windows in parts whose logits are not too large, and each part's share of them: gradients add up to the same."""
    vocabulary = model.config.get_text_config().vocab_size
    for ids_BT in in_batches(ids_NT, batch, vocabulary):
        yield ids_BT, len(ids_BT) / len(ids_NT)


def _loss(
    model: PreTrainedModel, ids_BT: Tensor, step: int, settings: Training, extra_loss: ExtraLoss | None
) -> Tensor:
    with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=settings.bfloat16):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    loss = next_token_loss(logits_BTV, ids_BT)
    return loss if extra_loss is None else loss + extra_loss(Forward(step, ids_BT, logits_BTV))


@torch.no_grad()
def _validation_loss(
    model: PreTrainedModel, windows_NT: Tensor, settings: Training, device: torch.device
) -> float | None:
    if not len(windows_NT):
        return None
    parts = _parts(model, windows_NT, settings.batch)
    return sum(float(_loss(model, ids_BT.to(device), 0, settings, None)) * weight for ids_BT, weight in parts)


@contextmanager
def _trainable(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters get gradients; afterwards all are as they were, without gradients left behind."""
    before = [(each, each.requires_grad) for each in {*model.parameters(), *trained}]
    try:
        for each, _ in before:
            each.requires_grad_(False)
        for each in trained:
            each.requires_grad_(True)
        yield
    finally:
        for each, required in before:
            each.requires_grad_(required)
            each.grad = None


def _fingerprint(settings: Training, seed: int, start: int, windows_NT: Tensor, trained: Sequence[nn.Parameter]) -> str:
    """The same for trainings that go the same way."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    digest.update(repr((seed, start, windows_NT.shape, [tuple(each.shape) for each in trained])).encode())
    digest.update(windows_NT.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _diverged(step: int, loss: float, norm: float, settings: Training) -> CompressError:
    return CompressError(
        "training.not-finite",
        f"the training diverged: loss {loss:g}, length of the gradient {norm:g}",
        where=f"step {step} of {settings.steps}, learning rate {settings.learning_rate:g}",
        fix=f"try learning_rate: {settings.learning_rate / 10:g}, or a longer warmup"
        + (", or bfloat16: false" if settings.bfloat16 else ""),
    )
