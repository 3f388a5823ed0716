"""What one training covers: its parameters, masks, callback and name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from llmcompress.training.masks import Masks
from llmcompress.training.on_policy import Sampler
from llmcompress.training.optimizer import ParameterGroup


class Callback:
    """Called after every step. Subclasses override what they need."""

    def after_step(self, step: int) -> bool:
        """Step 1, 2, … is done; True ends the training."""
        return False

    def state(self) -> dict[str, Tensor]:
        """State for resuming."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""


@dataclass(frozen=True)
class Job:
    """One training: what is trained, independent of settings and run."""

    title: str = "train"
    """For progress and the name of the state file: unique among the trainings of one pass."""
    parameters: Sequence[nn.Parameter | ParameterGroup] | None = None
    """The trained parameters, of the model or not; None: all parameters of the model."""
    masks: Masks | None = None
    """Masks of sparse weights; None: exact zeros of matrices stay zero."""
    callback: Callback | None = None
    sampler: Sampler | None = None
    """Text that a model writes in place of the given samples, or beside them; None: the given samples."""
    start: int = 0
    """Number of steps to skip: batches and learning rates are those of later steps."""

    @property
    def name(self) -> str:
        """The title as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
