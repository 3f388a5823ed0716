"""What a run computes with and where: one frozen value that travels instead of a dozen arguments. N = windows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmcompress.calibration.finished import FinishedWork
from llmcompress.calibration.homes import Home, InMemory
from llmcompress.calibration.ranks import ALONE, Ranks
from llmcompress.calibration.settings import Experts
from llmcompress.progress import Progress, Silent


@dataclass(frozen=True)
class RunContext:
    """Everything about a run that is neither the model nor a pass; `replace` derives another one from it."""

    windows_NT: Tensor
    """Calibration windows: token ids, all of the same length, without padding. 0×T: nothing is measured."""
    batch: int = 8
    """Windows that go through a block together."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where blocks compute."""
    storage_dtype: torch.dtype = torch.float32
    """Of scales and of all that stays dense in the files that will be written; values are rounded to it."""
    seed: int = 0
    """Of everything random."""
    home: Home = field(default_factory=InMemory)
    """Where weights are while nobody computes with them."""
    experts: Experts = "routed"
    """Which tokens the experts of a mixture are measured on."""
    ranks: Ranks = ALONE
    """The processes that share the windows."""
    keep: FinishedWork | None = None
    """Where finished work is kept and found again; None: nowhere."""
    stage: int = 0
    """Which stage of the passes is running: what it keeps is filed under this number."""
    progress: Progress = field(default_factory=Silent)

    def first_windows(self, count: int) -> RunContext:
        """The same run that looks at fewer windows."""
        return replace(self, windows_NT=self.windows_NT[:count])

    def generator(self) -> torch.Generator:
        """On the CPU, from the seed: the same numbers on every call."""
        return torch.Generator().manual_seed(self.seed)
