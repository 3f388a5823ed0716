"""What one training covers: its parameters, masks, callback and name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from llmcompress.training.masks import Masks
from llmcompress.training.optimizer import ParameterGroup


class Callback:
    """Called after every step. Subclasses override what they need."""

    def after_step(self, step: int) -> bool:
        """Step 1, 2, … is done; True ends the training."""
        return False

    def state(self) -> dict[str, Tensor]:
        """What a killed training must find again."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""


@dataclass(frozen=True)
class Job:
    """Everything about a training that is neither settings nor run."""

    title: str = "train"
    """For progress, and for the file that keeps its state: no two trainings of one pass may have the same."""
    parameters: Sequence[nn.Parameter | ParameterGroup] | None = None
    """What is trained, of the model or not; None: all parameters of the model."""
    masks: Masks | None = None
    """What happens to zeros; None: exact zeros of matrices stay exact zeros."""
    callback: Callback | None = None
    start: int = 0
    """Steps that are skipped: batches and learning rates are those of the steps after them."""

    @property
    def name(self) -> str:
        """The title as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
