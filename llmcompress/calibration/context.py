"""What a run computes with and where: one frozen value that travels instead of a dozen arguments. N = windows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmcompress.calibration.measurement_cache import CachedMeasurements, MeasurementCache
from llmcompress.calibration.offloading import InMemory, WeightStore
from llmcompress.calibration.process_group import ALONE, ProcessGroup
from llmcompress.calibration.resume_store import ResumeStore
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
    weights_at: WeightStore = field(default_factory=InMemory)
    """Where weights are while nobody computes with them."""
    experts: Experts = "routed"
    """Which tokens the experts of a mixture are measured on."""
    processes: ProcessGroup = ALONE
    """The processes that share the windows."""
    keep: ResumeStore | None = None
    """Where finished work is kept and found again; None: nowhere."""
    stage: int = 0
    """Which stage of the passes is running: what it keeps is filed under this number."""
    progress: Progress = field(default_factory=Silent)
    state: str | None = None
    """Names what the model is now, for as long as it stays that: under this name measurements are kept and found again.
    None: it may change at any time."""
    measured: MeasurementCache = field(default_factory=MeasurementCache)
    """What is known of the model in its states."""

    def first_windows(self, count: int) -> RunContext:
        """The same run that looks at fewer windows."""
        return replace(self, windows_NT=self.windows_NT[:count])

    def at(self, state: str) -> RunContext:
        """The same run for as long as the model stays what it is now; what was measured before is not known in it."""
        return replace(self, state=state, measured=MeasurementCache())

    def changing(self) -> RunContext:
        """The same run while the model is not what its state says: nothing is kept or found again."""
        return replace(self, state=None)

    def cached_measurements(self) -> CachedMeasurements | None:
        """What is known of the model as it is now, from these windows; None where it may change."""
        return self.measured.of(self.state, self.windows_NT, self.experts)

    def generator(self) -> torch.Generator:
        """On the CPU, from the seed: the same numbers on every call."""
        return torch.Generator().manual_seed(self.seed)
