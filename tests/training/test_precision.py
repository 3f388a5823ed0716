"""Under mixed precision modules that are named compute in float32, others do not; the loss goes the same way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.training.data.base import Windows
from llmcompress.training.loop import train
from llmcompress.training.settings import Training
from tests.families import tiny_model, tiny_tokens

IDS = tiny_tokens("llama", batch=4)
SETTINGS = Training(steps=6, batch=4, learning_rate=1e-3, mixed_precision="bf16")


def losses(**options: Any) -> tuple[float, ...]:
    model = tiny_model("llama")
    return train(model, Windows(IDS), SETTINGS.model_copy(update=options), RunContext(IDS)).losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_named_modules_compute_in_float32(checkpointing: bool) -> None:
    model, seen = tiny_model("llama"), dict[str, torch.dtype]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out.dtype))
    settings = SETTINGS.model_copy(
        update={"float32": ("lm_head", "*.layers.0.mlp"), "gradient_checkpointing": checkpointing}
    )
    train(model, Windows(IDS), settings, RunContext(IDS))
    found = {name for name, dtype in seen.items() if dtype == torch.float32}
    assert found == {"lm_head", *(f"model.layers.0.mlp.{each}_proj" for each in ("gate", "up", "down"))}
    assert torch.is_autocast_enabled("cpu") is False


def test_the_loss_stays_within_a_percent_of_float32() -> None:
    exact, low, layered = losses(mixed_precision=None), losses(), losses(float32=("lm_head", "*.layers.0.*"))
    for found in (low, layered):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(exact), rtol=0.01, atol=0)
    assert layered != low


def test_what_matches_nothing_is_refused() -> None:
    with pytest.raises(CompressError, match="matches no module"):
        losses(float32=("*.nothing",))
    with pytest.raises(ValueError, match="set that too"):
        Training(float32=("lm_head",))
