"""A whole model as tensors and JSON data, whatever was replaced in it; and the model again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.model.stock import stock_model
from llmcompress.modules.manifest import Manifest, apply_manifest, changes


def about_model(model: PreTrainedModel) -> dict[str, Any]:
    """What `model.state_dict()` does not say: the config, and how the model differs from that config's stock model."""
    return {"config": model.config.to_dict(), **changes(model, stock_model(model)).to_json()}


def model_again(like: PreTrainedModel, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> PreTrainedModel:
    """The model of these tensors; `like` is of the same family, dtype and attention implementation."""
    found = stock_model(like, config=type(like.config).from_dict(about["config"]))
    apply_manifest(found, Manifest.from_json(dict(about)), like.dtype)
    found.load_state_dict(tensors, strict=True, assign=True)
    found.tie_weights()
    found.generation_config = like.generation_config
    return found.eval().requires_grad_(False)
