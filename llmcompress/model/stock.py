"""The stock model of a config, without weights, for comparison with a live model."""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights


def meta_model(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The stock model of a config, all on the meta device; the config is copied."""
    with torch.device("meta"), no_init_weights():  # initialising meta tensors would take most of the time
        return kind(copy.deepcopy(config)).eval()


def without_parameters(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The stock model of this very config: parameters on the meta device, buffers (rotary tables) real."""
    with init_empty_weights(include_buffers=False):
        return kind(config).eval()


def stock_model(model: PreTrainedModel, *, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """What `model` would be if its config (or another) were all there is: parameters on the meta device, buffers real.

    Attention is implemented as in `model`, which transformers notes in the config.
    """
    wanted = copy.deepcopy(config or model.config)
    if hasattr(wanted, "quantization_config"):
        del wanted.quantization_config
    wanted._attn_implementation = model.config._attn_implementation
    return without_parameters(type(model), wanted)


def reloaded(config: PretrainedConfig) -> PretrainedConfig:
    """The config as it is after a round trip through config.json: what users of the saved model get."""
    again = type(config).from_dict(config.to_dict())
    again._attn_implementation = config._attn_implementation
    return again
