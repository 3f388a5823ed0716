"""What stock transformers builds from a config, found without weights: saved folders must fit it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.exporters.config import spelled_for_both
from llmcompress.loading.versions import TRANSFORMERS_MAJOR


@dataclass(frozen=True)
class Loader:
    """What stock transformers builds from a model's config."""

    merges_experts: bool = False
    """It joins experts of the checkpoint into banks, and loads no compressed-tensors folder then."""
    subclassed: frozenset[str] = frozenset()
    """Linears of a class derived from `nn.Linear`, which version 5 cannot load packed."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration, with every setting spelled for both majors."""


def loader_of(config: PretrainedConfig) -> Loader:
    """What stock transformers will do with a model of this configuration."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    linears = _linears(skeleton)
    subclassed = (name for name, kind in linears.items() if issubclass(kind, nn.Linear) and kind is not nn.Linear)
    return Loader(merges_on_load(skeleton), frozenset(subclassed), spelled_for_both(config))


def linears_of_loader(model: PreTrainedModel) -> dict[str, type[nn.Module]]:
    """Name → class of every linear (or Conv1D) that stock transformers builds for this configuration.

    The live model cannot say: its linears are replaced, and a replacement forgets the layout of a Conv1D.
    """
    with torch.device("meta"):
        return _linears(type(model)(copy.deepcopy(model.config)))


def _linears(skeleton: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(part) for name, part in skeleton.named_modules() if isinstance(part, (nn.Linear, Conv1D))}


def merges_on_load(model: PreTrainedModel) -> bool:
    """Whether transformers joins several weights of the checkpoint into one parameter while loading.

    Version 5 does so for banks of experts, and for a compressed-tensors folder it then expects codes there
    (`CompressedTensorsDequantize`): one whose experts are ordinary weights does not load.
    """
    if TRANSFORMERS_MAJOR < 5:
        return False
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model, add_legacy=False))
