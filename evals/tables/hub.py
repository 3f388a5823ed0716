"""Sizes of common models on the Hub that decide what a preset does to them, from the configs that the tests keep."""

from __future__ import annotations

from collections.abc import Mapping

from tables.cells import Facts, markdown

GROUPS = (128, 64, 32)
"""Largest first; what stock loaders read."""
NEEDED = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}


def hub_models(configs: Mapping[str, Facts]) -> str:
    """One line per model."""
    header = ["Model", "inputs", "group of `w4`", "key-value heads", "vocabulary", "output head"]
    return markdown(header, [_line(name, config) for name, config in configs.items() if config.keys() >= NEEDED])


def _line(name: str, config: Facts) -> list[str]:
    attention = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    inputs = {config["hidden_size"], config["intermediate_size"], attention * config["num_attention_heads"]}
    groups = [next((str(each) for each in GROUPS if size % each == 0), "row") for size in sorted(inputs)]
    return [
        f"`{name}`",
        ", ".join(f"{size:,}" for size in sorted(inputs)),
        ", ".join(dict.fromkeys(groups)) if len(set(groups)) == 1 else ", ".join(groups),
        str(config["num_key_value_heads"]),
        f"{config['vocab_size']:,}",
        "tied" if config.get("tie_word_embeddings") else "its own",
    ]
