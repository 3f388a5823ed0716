"""Finds blocks whose KV cache is wider or narrower than the config says: most graphs have one size for all caches."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmcompress.exporters.contents import Contents
from llmcompress.exporters.gguf_architectures import head_size

_KEYS_OR_VALUES = re.compile(r"(?:.*\.)?(?:k_proj|v_proj|key|value)")
_FUSED = re.compile(r"(?:.*\.)?(?:qkv_proj|query_key_value|c_attn|Wqkv)")
_OUTPUTS = ("out_features", "nf")
"""What an ordinary linear and a Conv1D call them."""
_HEADS = "num_key_value_heads"


def cache_problem(contents: Contents) -> str | None:
    """Which attention has another number of key-value heads than the config; None where all have the config's."""
    for name, values in contents.differences.attributes.items():
        if any(key.endswith(_HEADS) for key in values):
            return f"{name} {_WHY}"
    if not contents.config.get("num_attention_heads"):
        return None
    heads, size = int(contents.config["num_attention_heads"]), head_size(contents.config)
    shared = int(contents.config.get(_HEADS) or heads)
    for name, outputs in _changed(contents):
        separate = _KEYS_OR_VALUES.fullmatch(name) and outputs != shared * size
        if separate or (_FUSED.fullmatch(name) and outputs != (heads + 2 * shared) * size):
            return f"{name} {_WHY}"
    return None


_WHY = "has another number of key-value heads than the config, and caches have one size there"


def _changed(contents: Contents) -> Iterator[tuple[str, int]]:
    """Linears that were built with other sizes, or were replaced and may have others: names and outputs."""
    for name, values in contents.differences.attributes.items():
        yield from ((name, int(values[key])) for key in _OUTPUTS if key in values)
    for name in contents.differences.reshaped:
        if name in contents.modules:
            yield name, contents.modules[name].expression().shape[0]
