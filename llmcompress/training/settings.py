"""Settings of a short training in a recipe: steps, learning rate, batches, precision."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Training(BaseModel):
    """Settings of one training; passes nest it as an option."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak learning rate; see `schedule`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate decay after the warm-up, to zero (or none)."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises from zero."""
    batch: int = Field(default=8, ge=1)
    """Global batch size: samples per batch over all processes."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches per step; more of them take time but no memory."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of blocks and recompute the rest in the backward pass: less memory, more time."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay, for matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping: gradients with a larger norm are scaled down to this one."""
    mixed_precision: Literal["bf16", "fp16"] | None = None
    """Compute in bfloat16 or float16 (autocast; fp16 scales the loss and needs CUDA); weights, gradients, optimizer and
    loss stay float32. With bf16 a teacher that neither learns along nor is stored is loaded in bfloat16. None: compute
    in float32."""
    float32: tuple[str, ...] = ()
    """Globs of modules that compute in float32 under `mixed_precision`, such as `lm_head` or `*.layers.0.*`."""
    validation: float = Field(default=0.0, ge=0, le=0.5)
    """Fraction of the samples used for validation; their loss is reported before and after, and measured at every save,
    so that a training that diverges goes back to its best weights."""
    save_every: int = Field(default=100, ge=1)
    """Steps between two saves of the state from which an interrupted run resumes."""

    @model_validator(mode="after")
    def _lowered(self) -> Self:
        if self.float32 and self.mixed_precision is None:
            raise ValueError("`float32` names exceptions from `mixed_precision`: set that too")
        return self

    @property
    def lowered(self) -> bool:
        """Whether it computes in fewer bits than float32."""
        return self.mixed_precision is not None

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of models that are only asked; float16 would overflow in some that were trained in bfloat16."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    @property
    def windows(self) -> int:
        """Windows seen in all steps, repetitions included."""
        return self.steps * self.gradient_accumulation * self.batch
