"""Rotary positions in GGUF: keys of the metadata, and the frequency factors that Llama 3 has as a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FACTORS = "rope_freqs.weight"
"""The tensor by whose numbers llama.cpp divides the frequencies."""

_KINDS = ("default", "linear", "yarn", "llama3")


def rope_settings(config: Mapping[str, Any], head_size: int) -> dict[str, int | float | str]:
    """Keys below the architecture's name."""
    share = float(config.get("partial_rotary_factor") or 1.0)
    found: dict[str, int | float | str] = {
        "rope.dimension_count": int(head_size * share),
        "rope.freq_base": float(config.get("rope_theta") or 10000.0),
    }
    scaling, kind = _scaling(config)
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"])}
        found["rope.scaling.original_context_length"] = _original_length(config, scaling)
    return found


def rope_problem(config: Mapping[str, Any]) -> str | None:
    """Why the positions of this config cannot be stated; None: they can."""
    scaling, kind = _scaling(config)
    if kind not in _KINDS:
        return f"rotary positions of the kind `{kind}` are not written ({', '.join(_KINDS)} are)"
    odd = {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & {
        name for name, value in scaling.items() if value is not None
    }
    if kind == "yarn" and odd:
        return f"rotary positions of the kind `yarn` with {', '.join(sorted(odd))} are not written"
    return None


def rope_factors(config: Mapping[str, Any], head_size: int) -> Tensor | None:
    """What every frequency is divided by, float32; None: the config divides none.

    Source: Llama 3.1, `apply_scaling` of its reference code; `_compute_llama3_parameters` of transformers.
    """
    scaling, kind = _scaling(config)
    if kind != "llama3":
        return None
    factor, low, high = (float(scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = _original_length(config, scaling)
    base = float(config.get("rope_theta") or 10000.0)
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    wavelengths = 2 * math.pi * base**exponents
    smooth = (length / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths < length / high, torch.ones_like(between), between)
    return torch.where(wavelengths > length / low, torch.full_like(between, factor), factors).float()


def _scaling(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    scaling = config.get("rope_scaling") or {}
    return scaling, str(scaling.get("rope_type", scaling.get("type", "default")))


def _original_length(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    return int(scaling.get("original_max_position_embeddings") or config["max_position_embeddings"])
