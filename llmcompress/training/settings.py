"""Settings of a short training in a recipe: steps, learning rate, batches, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Training(BaseModel):
    """One training. `train` reads every field; passes nest it as an option."""

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
    """Samples that go through the model together, on all processes."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches that make one step; more of them cost time and no memory."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of blocks, and compute the rest once more for the gradient: less memory, more time."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, of matrices alone."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping: gradients with a larger norm are scaled down to this one."""
    mixed_precision: Literal["bf16", "fp16"] | None = None
    """Compute in bfloat16 or float16 (autocast; fp16 scales the loss and needs CUDA); weights, gradients, optimizer and
    loss stay float32. None: compute in float32."""
    validation: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the samples kept out of the training, whose loss is told before and after."""
    save_every: int = Field(default=100, ge=1)
    """Steps between two saves of the state from which a killed run resumes."""

    @property
    def windows(self) -> int:
        """That all steps together see, repeated ones counted again."""
        return self.steps * self.gradient_accumulation * self.batch
