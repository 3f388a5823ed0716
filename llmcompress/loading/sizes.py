"""Checks that the numbers of a config are plausible before anything is built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llmcompress.errors import CompressError

MOST_BLOCKS = 10_000
"""Transformers spends a millisecond on an empty block; the deepest models have a few hundred."""
_LARGEST = {
    "num_hidden_layers": MOST_BLOCKS,
    "hidden_size": 1_000_000,
    "head_dim": 65_536,
    "num_attention_heads": 65_536,
    "num_key_value_heads": 65_536,
    "vocab_size": 1_000_000_000,
    "intermediate_size": 10_000_000,
    "max_position_embeddings": 10_000_000_000,
}
"""By transformers' own names; whatever a model calls them."""
_MOST_EXPERTS = 100_000
_MOST_TIMES = 1024
"""As wide as a layer's inside may be, against the model's width; models stay below 32."""
_NUMBERS = ("initializer_range", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "attention_dropout")


def check_sizes(config: PretrainedConfig, folder: Path) -> None:
    """Refuse sizes that no model has, and values of another kind than a size.

    Raises: CompressError naming every such key with the value found.
    """
    text = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise _refused(folder, ["text_config does not describe a text model"])
    wrong = [f"{_called(text, key)} = {_shown(value)}" for key, value in _values(text) if not _fits(key, value)]
    wrong += [
        f"{key} = {_shown(value)} (a number is needed)"
        for key in _NUMBERS
        if (value := getattr(text, key, None)) is not None and not _is_number(value)
    ]
    heads, shared = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if not wrong and isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        wrong = [f"num_attention_heads = {heads} is not divisible by num_key_value_heads = {shared}"]
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
    width, partly = getattr(text, "head_dim", None), getattr(text, "partial_rotary_factor", None)
    if not wrong and rotary and isinstance(width, int) and width % 2 and partly is None:
        wrong = [f"head_dim = {width} is odd, but rotary embeddings need an even size"]
    wrong = wrong or _out_of_proportion(text)
    if wrong:
        raise _refused(folder, wrong)


def _refused(folder: Path, wrong: list[str]) -> CompressError:
    return CompressError(
        "model.bad-config",
        "config.json contains impossible values",
        where=f"{folder / 'config.json'}: {'; '.join(wrong)}",
        fix="compare it with the config.json of the original model",
    )


def _out_of_proportion(text: PretrainedConfig) -> list[str]:
    """A block is tried out on random weights, which must not take all memory there is."""
    hidden, inner, heads, width = (
        getattr(text, key, None) for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    )
    if not isinstance(hidden, int):
        return []
    found = []
    if isinstance(inner, int) and inner > _MOST_TIMES * hidden:
        found.append(f"intermediate_size = {inner} is over {_MOST_TIMES} times hidden_size = {hidden}")
    if isinstance(heads, int) and isinstance(width, int) and heads * width > _MOST_TIMES * hidden:
        found.append(f"num_attention_heads · head_dim = {heads * width} is over {_MOST_TIMES} times {hidden}")
    return found


def _values(text: PretrainedConfig) -> list[tuple[str, Any]]:
    """The sizes in this config; a missing one is not an error here."""
    known = [(key, value) for key in _LARGEST if (value := getattr(text, key, None)) is not None]
    experts = [(key, value) for key, value in vars(text).items() if "expert" in key and type(value) is int]
    return known + experts


def _fits(key: str, value: Any) -> bool:
    """Lists (a size for each layer) are left to transformers."""
    if isinstance(value, list | tuple):
        return key != "num_hidden_layers"
    if type(value) is not int:
        return False
    most = _LARGEST.get(key, _MOST_EXPERTS if key.startswith(("num_", "n_")) else 2**63)
    return (value >= 1 or key not in _LARGEST) and value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _called(text: PretrainedConfig, key: str) -> str:
    """What config.json calls it: GPT-2 says n_layer."""
    return str(text.attribute_map.get(key, key))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
