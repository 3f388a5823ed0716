"""The one training loop: AdamW on an objective, through accelerate, for everything that must train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.base import TrainingData
from llmcompress.training.engine import accelerated
from llmcompress.training.job import Job
from llmcompress.training.objectives.base import Objective
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.precision import computing_in_float32
from llmcompress.training.session import Session, Task, TrainingReport
from llmcompress.training.settings import Training
from llmcompress.training.step import checkpointed_blocks
from llmcompress.training.teacher import Teacher


def train(
    model: PreTrainedModel,
    data: TrainingData,
    settings: Training,
    context: RunContext,
    *,
    objective: Objective | None = None,
    teacher: Teacher | None = None,
    job: Job | None = None,
) -> TrainingReport:
    """Train in place; the model must be on the device in float32, in the mode (`eval`: no dropout) it shall train in.

    The same seed gives the same weights, also when killed and resumed from the run folder (`context.keep`), and on
    any number of processes up to the order of the sums. Whoever launched the processes decides about DDP, FSDP or
    DeepSpeed (docs/training.md says what of that is tested).

    Raises: CompressError when the loss or its gradient is no longer finite; the model then has its best weights by
    validation, or without validation those saved last.
    """
    objective, job = objective or CrossEntropy(), job or Job()
    if objective.needs_teacher() and teacher is None:
        raise CompressError(
            "training.no-teacher",
            f"the objective {objective!r} needs a teacher, and none was given",
            fix="set `teacher`, or use cross_entropy",
            exit_code=ExitCode.USAGE,
        )
    own = objective.begin(model, teacher)
    if own:
        job = replace(job, parameters=[*(model.parameters() if job.parameters is None else job.parameters), *own])
    task = Task(model, data, settings, context, objective, teacher, job)
    with _surroundings(task) as accelerator:
        return Session(task, accelerator).run()


@contextmanager
def _surroundings(task: Task) -> Iterator[Accelerator]:
    """What is set up for a training and taken down after it."""
    with ExitStack() as stack:
        stack.enter_context(_only_these_train(task))
        stack.enter_context(_own_random_numbers(task.context.device))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(computing_in_float32(task.model, task.settings.float32, task.context.device))
        stack.enter_context(checkpointed_blocks(task.model, task.settings.gradient_checkpointing))
        yield stack.enter_context(accelerated(task.settings, task.context.device))


@contextmanager
def _only_these_train(task: Task) -> Iterator[None]:
    """Only these parameters get gradients; afterwards all are as they were, without gradients left behind."""
    trained = task.parameters()
    before = [(each, each.requires_grad) for each in {*task.model.parameters(), *trained}]
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


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn inside does not move the generators outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
