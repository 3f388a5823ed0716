"""Several processes that calibrate one model: each runs different windows, and their statistics are summed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from llmcompress.errors import CompressError, ExitCode

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)
"""How long one process waits for another: the first one also reads, evaluates and writes alone."""


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process and their number; one by default. All have the same model and do the same work on it.

    Reduced statistics are identical on all, so all compute the same weights; to be safe on machines of
    different kinds, the first one's finished blocks are broadcast (`broadcast_tensors`).
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is rank 0, which writes."""
        return self.index == 0

    def shard(self, windows_NT: Tensor) -> Tensor:
        """This process's windows: every `count`-th.

        Raises: CompressError when there are fewer windows than processes.
        """
        if 0 < len(windows_NT) < self.count:
            raise CompressError(
                "processes.too-many",
                f"{self.count} processes cannot share {len(windows_NT)} calibration windows",
                fix="start fewer processes or raise `calibration.samples`",
                exit_code=ExitCode.USAGE,
            )
        return windows_NT[self.index :: self.count]

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """All-reduce: the sum over all processes, in place."""
        self._reduce(tensor, distributed.ReduceOp.SUM)

    def all_reduce_max_(self, tensor: Tensor) -> None:
        """All-reduce: the elementwise maximum over all processes, in place."""
        self._reduce(tensor, distributed.ReduceOp.MAX)

    def broadcast(self, value: T) -> T:
        """The first process's value, on all."""
        if self.count == 1:
            return value
        box = [value if self.is_first else None]
        distributed.broadcast_object_list(box, src=0)
        found = box[0]
        return found  # type: ignore[return-value]

    def broadcast_tensors(self, module: nn.Module) -> None:
        """The first process's tensors in the modules of all, which must have the same shapes."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in module.state_dict().values():
                there = _reachable(tensor)
                distributed.broadcast(there, src=0)
                tensor.copy_(there)

    def require_one(self, what: str) -> None:
        """Raises: CompressError when there are several processes."""
        if self.count > 1:
            raise CompressError(
                "processes.one-only",
                f"{what} cannot run in several processes: it needs more than statistics that sum over tokens",
                fix="start it without torchrun",
                exit_code=ExitCode.USAGE,
            )

    def _reduce(self, tensor: Tensor, how: distributed.ReduceOp.RedOpType) -> None:
        if self.count > 1:
            there = _reachable(tensor)
            distributed.all_reduce(there, op=how)
            tensor.copy_(there)


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor where the processes can exchange it: NCCL sees GPUs alone."""
    there = tensor.cuda() if distributed.get_backend() == "nccl" else tensor
    return there.contiguous()


ALONE = ProcessGroup()


@contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """The process group that `torchrun` started, for the duration of the context; a single process otherwise.

    NCCL on CUDA, gloo on a CPU. An existing process group is used as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not distributed.is_initialized():
        yield ALONE
        return
    joined_here = not distributed.is_initialized()
    if joined_here:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size())
    finally:
        if joined_here:
            distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, when several were started on one machine."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
