"""Sets up accelerate for one training, and tears it down: processes, mixed precision, gradient accumulation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import nn

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.job import Job
from llmcompress.training.settings import Training

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Engines that give a process only a part of every parameter, or of the optimizer's state."""


@contextmanager
def accelerated(settings: Training, device: torch.device) -> Iterator[Accelerator]:
    """The accelerator of one training. How many processes there are, and FSDP or DeepSpeed, is what launched them says.

    Accelerate keeps its state per process and refuses a second training with other settings; it is put aside
    meanwhile and is afterwards what it was.

    Raises: CompressError where the environment cannot do what the settings or the launcher ask for.
    """
    if settings.mixed_precision == "fp16" and device.type != "cuda":
        raise CompressError(
            "training.fp16",
            f"fp16 mixed precision needs a CUDA device, but this training runs on {device.type}",
            where="training.mixed_precision",
            fix="set mixed_precision: bf16, or remove it",
            exit_code=ExitCode.USAGE,
        )
    with accelerate_state_apart():
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            device_placement=False,  # the caller has put the model where it belongs
            mixed_precision=settings.mixed_precision or "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(1, sync_with_dataloader=False),
            # a batch is what all processes see together: their number does not change the training
            dataloader_config=DataLoaderConfiguration(split_batches=True, dispatch_batches=False),
            rng_types=[],
            # experts that no token of this process was sent to have no gradient here
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        _check(accelerator, settings, device)
        yield accelerator


@contextmanager
def accelerate_state_apart() -> Iterator[None]:
    """Accelerate's state of this process is put aside, and afterwards is what it was."""
    states = [AcceleratorState._shared_state, PartialState._shared_state, GradientState._shared_state]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)


def _check(accelerator: Accelerator, settings: Training, device: torch.device) -> None:
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise CompressError(
            "training.processes",
            f"{asked} processes were started, but accelerate uses only {accelerator.num_processes}",
            fix="start with `torchrun`; on a CPU `accelerate launch` starts a single process",
            exit_code=ExitCode.USAGE,
        )
    wanted = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}
    for name, kind in wanted.items():
        if os.environ.get(name, "false").lower() == "true" and accelerator.distributed_type != kind:
            raise CompressError(
                "training.engine",
                f"{kind.value} was requested but has no effect on {device.type}",
                where=name,
                fix="start with `torchrun` instead; or use GPUs",
                exit_code=ExitCode.USAGE,
            )
    if settings.batch % accelerator.num_processes:
        raise CompressError(
            "training.batch",
            f"a batch of {settings.batch} samples cannot be divided among {accelerator.num_processes} processes",
            where="training.batch",
            fix=f"use a multiple of {accelerator.num_processes}",
            exit_code=ExitCode.USAGE,
        )


def require_whole_parameters(
    accelerator: Accelerator, trained: Sequence[nn.Parameter], job: Job, context: RunContext
) -> None:
    """What needs every parameter whole in every process is refused where the engine shards them.

    Raises: CompressError.
    """
    if job.sampler is not None and accelerator.num_processes > 1:
        raise CompressError(
            "training.on-policy",
            "generated text: not supported with several processes",
            fix="start without `torchrun`, or remove `on_policy`",
            exit_code=ExitCode.USAGE,
        )
    if accelerator.distributed_type not in _SHARDED:
        return
    pruned = any(bool((each == 0).any()) for each in trained if each.dim() > 1)
    for present, what in (
        (job.masks is not None or pruned, "zeros that must stay zero"),
        (context.keep is not None, "a training whose state is kept in a run folder"),
    ):
        if present:
            raise CompressError(
                "training.sharded",
                f"{what}: not supported with {accelerator.distributed_type.value}, which shards parameters",
                fix="start with `torchrun` (DDP) instead",
                exit_code=ExitCode.USAGE,
            )
