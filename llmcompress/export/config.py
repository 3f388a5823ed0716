"""`config.json` that both transformers 4 and 5 read the same way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel


def portable_config(model: PreTrainedModel, storage_dtype: torch.dtype) -> dict[str, Any]:
    """The model's configuration as JSON data, with every setting spelled for both majors.

    transformers 5 moved the rotary settings into `rope_parameters`; 4 does not look there and silently falls back to
    its defaults. It also renamed `torch_dtype` to `dtype`, and moved settings to a new name with the old one as an
    alias (`num_experts` of Qwen3-MoE). Both spellings are written, with the same values.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.tie_word_embeddings = head_is_tied(model)
    data: dict[str, Any] = config.to_dict()
    data.pop("quantization_config", None)
    data["dtype"] = data["torch_dtype"] = str(storage_dtype).removeprefix("torch.")
    aliases = {old: data[new] for old, new in config.attribute_map.items() if new in data}
    return {**aliases, **_rotary_as_in_4(data.get("rope_parameters")), **data}


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one and the same parameter."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is embedding.weight


def _rotary_as_in_4(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of `rope_parameters` under the names that transformers 4 reads."""
    if not parameters:
        return {}
    if "full_attention" in parameters:
        # one table per kind of attention: 4 knows the local one by its base alone (Gemma3)
        local = parameters.get("sliding_attention") or {}
        spelled = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        return spelled | _rotary_as_in_4(parameters["full_attention"])
    names = {"rope_theta": ["rope_theta"]}
    if "partial_rotary_factor" in parameters:
        # GPT-NeoX has its own names for both; to other families they mean nothing
        names = {"rope_theta": ["rope_theta", "rotary_emb_base"]}
        names["partial_rotary_factor"] = ["partial_rotary_factor", "rotary_pct"]
    spelled = {old: parameters[new] for new, olds in names.items() if new in parameters for old in olds}
    scaling = {key: value for key, value in parameters.items() if key not in names}
    return {**spelled, "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None}
