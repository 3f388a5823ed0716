"""What a recipe may say about a short training: steps, learning rate, batches."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Training(BaseModel):
    """One training on the calibration windows. `train` reads every field; passes nest it as an option."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Its highest value; see `schedule`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up, to zero (or not at all)."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    batch: int = Field(default=8, ge=1)
    """Windows that go through the model together."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches that make one step; more of them cost time and no memory."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, of matrices alone."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are shortened to this."""
    bfloat16: bool = False
    """Multiply in bfloat16 (autocast); weights, gradients, optimizer and loss stay float32."""
    validation: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the windows kept out of the training, whose loss is told before and after."""

    @property
    def windows(self) -> int:
        """That all steps together see, repeated ones counted again."""
        return self.steps * self.gradient_accumulation * self.batch
