"""Rotary settings for transformers 4, which does not read `rope_parameters` and would silently use defaults."""

from __future__ import annotations

from typing import Any


def rotary_as_in_4(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """What transformers 5 says in `rope_parameters`, under the names that 4 reads."""
    if not parameters:
        return {}
    if "full_attention" in parameters:
        # one table per kind of attention: 4 knows the local one by its base alone (Gemma3)
        local = parameters.get("sliding_attention") or {}
        spelled = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        return spelled | rotary_as_in_4(parameters["full_attention"])
    # GPT-NeoX has its own names for both; to other families they mean nothing
    names = {
        "rope_theta": ("rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    }
    spelled = {old: parameters[new] for new, olds in names.items() if new in parameters for old in olds}
    scaling = {key: value for key, value in parameters.items() if key not in names}
    return {**spelled, "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None}
