"""One training from start to end: prepared by accelerate, resumed, stepped, saved."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import NOTHING_SAVED, CompressError
from llmcompress.training.best import BestWeights
from llmcompress.training.checkpoint import Checkpoint, Reached, Stateful, random_states, restore_random
from llmcompress.training.data.base import BatchRange, IndexedSamples, TrainingData
from llmcompress.training.data.batch import Batch, padded
from llmcompress.training.engine import require_whole_parameters
from llmcompress.training.head import Head, find_head, rows_at_once
from llmcompress.training.job import Job
from llmcompress.training.masks import ZerosStay
from llmcompress.training.objectives.base import Objective
from llmcompress.training.optimizer import adamw, optimizer_groups, schedule
from llmcompress.training.settings import Training
from llmcompress.training.step import Step
from llmcompress.training.teacher import Teacher

_SKIPPED = 20
"""Steps in a row that fp16 may skip while it looks for a loss scale that does not overflow."""
_UNEXPLAINED = "the logits cannot be computed in chunks (unknown output head), so they are computed for whole"


@dataclass(frozen=True)
class Task:
    """The arguments of `train`."""

    model: PreTrainedModel
    data: TrainingData
    settings: Training
    context: RunContext
    objective: Objective
    teacher: Teacher | None
    job: Job

    def groups(self) -> list[dict[str, Any]]:
        """For the optimizer."""
        return optimizer_groups(self.model, self.job.parameters, self.settings)

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [each for group in self.groups() for each in group["params"]]


@dataclass(frozen=True)
class TrainingReport:
    """The result of a training."""

    losses: tuple[float, ...]
    """The training loss, before each step."""
    tokens: int
    """Predicted tokens, repetitions included."""
    validation_before: float | None = None
    """Mean validation loss."""
    validation_after: float | None = None

    @property
    def steps(self) -> int:
        """Completed steps; fewer than requested if the callback ended the training."""
        return len(self.losses)


class Session:
    """A task, and everything that accelerate prepared for it."""

    def __init__(self, task: Task, accelerator: Accelerator) -> None:
        self._task, self._accelerator = task, accelerator
        settings, context, trained = task.settings, task.context, task.parameters()
        require_whole_parameters(accelerator, trained, task.job, context)
        learned, self._kept_out = task.data.held_out(settings.validation, context.seed)
        self._best = BestWeights()
        head, at_once = self._head_and_samples(learned)
        self._pieces = settings.batch // at_once * settings.gradient_accumulation
        accelerator.gradient_accumulation_steps = self._pieces
        step, plain = Step(task.model, task.objective, task.teacher, head, trained), adamw(task.groups(), settings)
        self._masks = task.job.masks or ZerosStay(trained)
        self._keep = self._checkpoint(step, trained, plain)
        self._reached = (self._keep.load() if self._keep else None) or Reached(task.job.start)
        part = BatchRange(self._reached.step * self._pieces, settings.steps * self._pieces, at_once, context.seed)
        names = {id(each): name for name, each in step.named_parameters()}
        self._step, self._optimizer, self._loader, self._rates = accelerator.prepare(
            step, plain, learned.loader(part), schedule(plain, settings, self._reached.step)
        )
        # FSDP puts others in the place of parameters
        found = dict(accelerator.unwrap_model(self._step).named_parameters())
        self._trained = [found[names[id(each)]] for each in trained]
        self._skipped = 0

    def run(self) -> TrainingReport:
        """Run all remaining steps."""
        before = self._reached.validation
        if before is None and self._kept_out is not None:
            before = self._validation_loss(self._kept_out)
            self._best.consider(0, before, self._trained)
            self._reached = replace(self._reached, validation=before)
        torch.manual_seed(self._task.context.seed)
        self._restore()
        if self._task.job.sampler and not self._reached.step:
            self._task.job.sampler.validated(before)
        if not self._reached.finished:
            self._steps()
        after = None if self._kept_out is None else self._validation_loss(self._kept_out)
        return TrainingReport(self._reached.losses, self._reached.tokens, before, after)

    def _steps(self) -> None:
        settings, context, job = self._task.settings, self._task.context, self._task.job
        batches, first = iter(self._loader), self._reached.step
        for number in range(first + 1, settings.steps + 1):
            loss, tokens = self._one_step(number, batches)
            text = f"{job.title}: step {number}/{settings.steps}, loss {loss:.3f}"
            context.progress.substep(text, done=number, total=settings.steps)
            stop = bool(job.callback and job.callback.after_step(number))
            if job.sampler and job.sampler.validates(number) and self._kept_out is not None:
                job.sampler.validated(self._validation_loss(self._kept_out))
            losses = (*self._reached.losses, loss)
            finished = stop or number == settings.steps
            self._reached = replace(
                self._reached, step=number, losses=losses, tokens=self._reached.tokens + tokens, finished=finished
            )
            due = number % settings.save_every == 0
            if due and not finished and self._kept_out is not None:
                self._best.consider(number, self._validation_loss(self._kept_out), self._trained)
            if self._keep and (finished or due):
                self._save(self._keep)
            if stop:
                return

    def _one_step(self, number: int, batches: Iterator[Batch]) -> tuple[float, int]:
        """The loss before the step, and how many tokens it is a mean over."""
        accelerator = self._accelerator
        mine = [self._batch(number, next(batches)) for _ in range(self._pieces)]
        tokens = round(self._sum(sum(batch.predicted for batch in mine)))
        if not tokens:
            raise CompressError(
                "training.no-targets",
                "a batch has no target tokens: the loss is undefined",
                where=f"step {number}",
                fix="raise `tokens` if prompts fill it completely; remove rows with empty responses",
                saved=self._saved,
            )
        loss = 0.0
        for batch in mine:
            # accelerate divides by the pieces, and takes the mean over processes: what is left is a mean over tokens
            weight = batch.predicted * self._pieces * accelerator.num_processes / tokens
            with accelerator.accumulate(self._step):
                part = self._step(batch, number) * weight
                accelerator.backward(part)
            loss += float(part.detach()) / (self._pieces * accelerator.num_processes)
        loss = self._sum(loss)
        self._masks.before_step(number, self._optimizer)
        norm = self._clipped()
        self._check_finite(number, loss, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._rates.step()
        self._masks.after_step(number, self._optimizer)
        return loss, tokens

    def _batch(self, number: int, given: Batch) -> Batch:
        """On the device; what the sampler makes of it, where there is one."""
        sampler, given = self._task.job.sampler, given.to(self._task.context.device)
        return sampler.batch(number, given, self._task.model) if sampler else given

    def _clipped(self) -> float:
        """The gradient norm before clipping; DeepSpeed clips by itself and may not report it."""
        norm = self._accelerator.clip_grad_norm_(self._trained, self._task.settings.max_grad_norm)
        return 0.0 if norm is None else float(norm)

    def _check_finite(self, number: int, loss: float, norm: float) -> None:
        """Raises: CompressError when it has diverged; the best weights are put back, without validation those saved."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        self._skipped = 0 if finite else self._skipped + 1
        # fp16 skips a step whose scaled gradient overflows, and lowers the scale
        if finite or (self._accelerator.scaler and math.isfinite(loss) and self._skipped < _SKIPPED):
            return
        saved = self._saved
        if self._keep:
            self._keep.load()
        settings = self._task.settings
        back = self._best.put_back(self._trained)
        raise CompressError(
            "training.not-finite",
            f"training diverged: loss {loss:g}, gradient norm {norm:g}",
            where=f"{self._task.job.title}: step {number} of {settings.steps}, "
            f"learning rate {settings.learning_rate:g}"
            + f"; the model has the weights of step {self._best.step} again, the best in validation"
            * back,
            fix=f"try learning_rate: {settings.learning_rate / 10:g}, or a longer warmup"
            + (", or remove mixed_precision" if settings.mixed_precision else ""),
            saved=saved,
        )

    @property
    def _saved(self) -> str:
        return self._keep.saved if self._keep else NOTHING_SAVED

    @torch.no_grad()
    def _validation_loss(self, kept_out: IndexedSamples) -> float:
        """Every process evaluates all samples, which are few."""
        total, tokens = 0.0, 0
        at_once = max(1, self._task.settings.batch // self._accelerator.num_processes)
        for batch in DataLoader(
            kept_out, batch_size=at_once, collate_fn=padded, generator=torch.Generator().manual_seed(0)
        ):
            total += float(self._step(batch.to(self._task.context.device), 0)) * batch.predicted
            tokens += batch.predicted
        return total / max(tokens, 1)

    def _head_and_samples(self, data: TrainingData) -> tuple[Head | None, int]:
        """The head, if the logits of a whole batch are too large or many not needed; how many samples at once."""
        model, context = self._task.model, self._task.context
        vocabulary, processes = model.config.get_text_config().vocab_size, self._accelerator.num_processes
        batch, most = self._task.settings.batch, rows_at_once(vocabulary)
        mine, longest = batch // processes, data.longest
        fits_at_once = longest is not None and mine * longest <= most
        if fits_at_once and data.predicts_all and self._task.job.sampler is None:
            return None, batch
        head = find_head(model, torch.arange(min(vocabulary, 16), device=context.device)[None])
        if head is not None or fits_at_once:
            return head, batch
        fits = [count for count in range(1, mine + 1) if longest and mine % count == 0 and count * longest <= most]
        at_once = max(fits, default=1)
        context.progress.note(f"{self._task.job.title}: {_UNEXPLAINED} samples, {at_once} at a time")
        return None, at_once * processes

    def _checkpoint(self, step: Step, trained: list[nn.Parameter], optimizer: Optimizer) -> Checkpoint | None:
        context, job = self._task.context, self._task.job
        if context.keep is None:
            return None
        parts: dict[str, Stateful] = {"mask": self._masks, "objective": self._task.objective}
        if self._kept_out is not None:
            parts["best"] = self._best
        if job.callback:
            parts["callback"] = job.callback
        if job.sampler:
            parts["sampler"] = job.sampler
        path = context.keep.training_file(context.stage, job.name)
        return Checkpoint(path, self._fingerprint(step), trained, optimizer, parts)

    def _fingerprint(self, step: Step) -> str:
        """The same for trainings that go the same way: same settings, same samples, same weights at the start."""
        task = self._task
        settings = task.settings.model_dump_json(exclude={"save_every"})
        start = [(name, tuple(each.shape), _bits(each)) for name, each in step.named_parameters()]
        how = (repr(task.objective), repr(task.job.sampler))
        facts = (settings, task.context.seed, task.job.start, task.data.fingerprint, how, start)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _save(self, keep: Checkpoint) -> None:
        """The first process writes; all wait for it."""
        mine = [random_states(self._task.context.device)]
        processes = gather_object(mine) if self._accelerator.num_processes > 1 else mine
        random = {f"{index}.{kind}": state for index, states in enumerate(processes) for kind, state in states.items()}
        scaler = self._accelerator.scaler
        if self._accelerator.is_main_process:
            keep.save(replace(self._reached, random=random, scaler=scaler.state_dict() if scaler else {}))
        self._accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Random numbers and loss scale, which come last."""
        mine = f"{self._accelerator.process_index}."
        states = {name.removeprefix(mine): s for name, s in self._reached.random.items() if name.startswith(mine)}
        if states:
            restore_random(states, self._task.context.device)
        if self._reached.scaler and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(dict(self._reached.scaler))

    def _sum(self, value: float) -> float:
        """Over all processes."""
        if self._accelerator.num_processes == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self._task.context.device)
        return float(self._accelerator.reduce(total, reduction="sum"))


def _bits(tensor: Tensor) -> int:
    """A sum over the bits of all numbers: whole numbers, so no order of adding changes it."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(kind).sum(dtype=torch.int64))
