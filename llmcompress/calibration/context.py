"""The context of a run, one frozen value: windows, batch, device, dtype, seed, weight store, processes, progress. N =
windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmcompress.calibration.measurement_cache import CachedMeasurements, MeasurementCache
from llmcompress.calibration.offloading import InMemory, WeightStore
from llmcompress.calibration.process_group import ALONE, ProcessGroup
from llmcompress.calibration.resume_store import ResumeStore
from llmcompress.calibration.settings import Experts
from llmcompress.loading.teachers import TeacherFiles, Teachers
from llmcompress.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExampleRows:
    """Training examples that the recipe's `data` steps made, and how a training reads them."""

    rows: Sequence[Mapping[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    tokens: int
    """The most in a sample."""
    chat_template: str | None = None
    """A Jinja file, for a tokenizer that has no chat template."""


@dataclass(frozen=True)
class RunContext:
    """Everything about a run that is neither the model nor a pass; `dataclasses.replace` derives other contexts."""

    windows_NT: Tensor
    """Calibration windows: token ids, all of the same length, without padding. 0×T: nothing is measured."""
    held_out_NT: Tensor | None = None
    """Windows that no pass measures, on which finished blocks are compared with their baseline; None: they are not."""
    batch: int = 8
    """Batch size: windows that pass through a block together."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device on which blocks compute."""
    storage_dtype: torch.dtype = torch.float32
    """Dtype of scales and dense tensors in the saved files; values are rounded to it."""
    seed: int = 0
    """Random seed."""
    weights_at: WeightStore = field(default_factory=InMemory)
    """Where weights are stored while they are not in use."""
    zeros_are_masks: bool = True
    """Whether every exact zero was left by pruning; otherwise those that lie on a grid are weights like others."""
    mixed_precision: Literal["bf16"] | None = None
    """What blocks multiply in while calibration data run through them; None: float32."""
    experts: Experts = "routed"
    """Tokens on which the experts of a mixture are measured."""
    processes: ProcessGroup = ALONE
    """The processes that share the windows."""
    keep: ResumeStore | None = None
    """Saves finished work for resuming; None: nothing is saved."""
    stage: int = 0
    """Number of the running stage, under which its work is saved."""
    progress: Progress = field(default_factory=Silent)
    teachers: Teachers = field(default_factory=TeacherFiles)
    """Models that a pass may learn from."""
    examples: ExampleRows | None = None
    """What passes that train learn from, in place of the windows; None: the windows."""
    state: str | None = None
    """Name of the model's current state, the key of cached measurements.
    None: it may change at any time."""
    measured: MeasurementCache = field(default_factory=MeasurementCache)
    """Cached measurements."""

    def first_windows(self, count: int) -> RunContext:
        """The same context with only the first windows."""
        return replace(self, windows_NT=self.windows_NT[:count])

    def at(self, state: str) -> RunContext:
        """The context while the model has the given state, with an empty measurement cache."""
        return replace(self, state=state, measured=MeasurementCache())

    def changing(self) -> RunContext:
        """The context while the model changes: nothing is cached."""
        return replace(self, state=None)

    def cached_measurements(self) -> CachedMeasurements | None:
        """Cached measurements of the model's current state on these windows; None while it changes."""
        return self.measured.of(self.state, self.windows_NT, self.experts)

    def generator(self) -> torch.Generator:
        """On the CPU, from the seed: the same numbers on every call."""
        return torch.Generator().manual_seed(self.seed)
