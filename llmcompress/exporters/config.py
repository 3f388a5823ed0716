"""Writes a `config.json` that transformers 4 and 5 read alike."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.loading.rotary import rotary_as_in_4


def portable_config(model: PreTrainedModel, storage_dtype: torch.dtype) -> dict[str, Any]:
    """The model's configuration as JSON data, with every setting spelled for both majors.

    transformers 5 moved the rotary settings into `rope_parameters`; 4 does not look there and silently falls back to
    its defaults. It also renamed `torch_dtype` to `dtype`, and moved settings to a new name with the old one as an
    alias (`num_experts` of Qwen3-MoE). Both spellings are written, with the same values.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.tie_word_embeddings = head_is_tied(model)
    data = spelled_for_both(config)
    for private in ("quantization_config", "_name_or_path"):
        data.pop(private, None)  # the latter is a path on this machine
    data["dtype"] = data["torch_dtype"] = str(storage_dtype).removeprefix("torch.")
    return data


def spelled_for_both(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as JSON data, in the names of transformers 4 and of 5."""
    data: dict[str, Any] = config.to_dict()
    aliases = {old: data[new] for old, new in config.attribute_map.items() if new in data}
    return {**aliases, **rotary_as_in_4(data.get("rope_parameters")), **data}


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one and the same parameter."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is embedding.weight
