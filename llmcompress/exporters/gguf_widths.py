"""Blocks of different widths in a GGUF file: heads and channels of every block as lists, where a graph reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from llmcompress.exporters.contents import Contents
from llmcompress.exporters.gguf_architectures import Config, Setting, architecture_of, head_size
from llmcompress.modules.base import CompressedModule

_SITE = re.compile(r"blk\.(\d+)\.(attn_q|attn_k|ffn_gate)")
_OF_WIDTH = re.compile(r"\.(self_attn|mlp)(\.(q|k|v|o|gate|up|down)_proj(\.(weight|bias))?)?$")
"""What differs from the stock model where heads or channels were removed."""


def widths_problem(contents: Contents) -> str | None:
    """Why llama.cpp has no graph for what differs in size; None where only heads and channels do, and it has one."""
    changed = (*contents.rearranged, *contents.differences.reshaped)
    if not changed:
        return None
    wraps = any(module.wraps_original for module in contents.modules.values())
    row = architecture_of(str(contents.config.get("model_type")))
    if wraps or row is None or row.per_block is None or any(_OF_WIDTH.search(name) is None for name in changed):
        return f"llama.cpp has no graph for {', '.join(changed[:3])}"
    return None


def widths_by_block(model: nn.Module, config: Config, names: Callable[[str], str | None]) -> dict[str, Setting]:
    """Settings of widths, lists of one number a block where blocks differ; empty where the config says the same."""
    found: dict[str, dict[int, int]] = {"attn_q": {}, "attn_k": {}, "ffn_gate": {}}
    for name, module in model.named_modules():
        outputs = _outputs(module)
        site = _SITE.fullmatch(names(name) or "") if outputs else None
        if site is not None:
            found[site[2]][int(site[1])] = outputs
    size, stated = head_size(config), _stated(config)
    heads = {kind: [found[kind][block] // size for block in sorted(found[kind])] for kind in ("attn_q", "attn_k")}
    lists = {
        "attention.head_count": heads["attn_q"],
        "attention.head_count_kv": heads["attn_k"],
        "feed_forward_length": [found["ffn_gate"][block] for block in sorted(found["ffn_gate"])],
    }
    if all(set(each) <= {stated[key]} for key, each in lists.items()):
        return {}
    if all(len(set(each)) == 1 for each in lists.values()):
        return {key: each[0] for key, each in lists.items()}
    return dict(lists)


def _stated(config: Config) -> Mapping[str, int]:
    heads = int(config["num_attention_heads"])
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "feed_forward_length": int(config["intermediate_size"]),
    }


def _outputs(module: nn.Module) -> int:
    if isinstance(module, CompressedModule | nn.Linear):
        return int(getattr(module, "out_features", 0))
    return 0
