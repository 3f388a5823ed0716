"""What the architectures of GGUF are called, which settings their files state, and what llama.cpp takes for granted.

The format is defined per architecture: a reader computes with the graph of `general.architecture`, and its settings are
keys under that name. So this is a table, the one place that names families (docs/decisions/0033). A new architecture
is a row; names of tensors come from the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmcompress.exporters.gguf_rope import rope_problem, rope_settings

Setting = bool | int | float | str | Sequence[Any]
"""A value of the metadata: unsigned integers, float32, text, or a list of one kind."""

Config = Mapping[str, Any]
"""A model's config as `portable_config` writes it: every setting in the spelling of transformers 4 too."""


@dataclass(frozen=True)
class Architecture:
    """One row: a graph of llama.cpp and the transformers models that it computes."""

    name: str
    """`general.architecture`."""
    model_types: tuple[str, ...]
    """`model_type` in config.json."""
    activation: str
    """Of the gated FFN, which no key states."""
    interleaves_rotary: bool = False
    """Rotary pairs are neighbours (2i, 2i + 1) and not halves: rows of queries and keys are put in that order."""
    norm_offset: float = 0.0
    """Added to norm weights, where transformers computes 1 + w and llama.cpp w."""
    full_every: int | None = None
    """Of so many blocks the last one attends to everything and the others to a window; None: windows do not exist."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further keys → names in the config; written where the config has a value."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Names in the config → the only value that llama.cpp computes; a config without the name has it too."""
    scales_by_head: bool = False
    """Scores are divided by the root of the head's size, while the config may say something else."""
    per_block: str | None = None
    """Another architecture with the same graph, whose blocks may have different widths."""
    always: Mapping[str, Setting] = field(default_factory=dict)
    """Keys that its files have whatever the config says."""


_SHARED: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}

_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_ALL_BLOCKS_HAVE_EXPERTS: Mapping[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}

ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), "silu", interleaves_rotary=True, per_block="deci"),
    Architecture(
        "llama",
        ("mixtral",),
        "silu",
        interleaves_rotary=True,
        settings={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    Architecture("qwen2", ("qwen2",), "silu"),
    Architecture("qwen3", ("qwen3",), "silu", constants={"attention_bias": False}),
    Architecture(
        "qwen2moe",
        ("qwen2_moe",),
        "silu",
        settings=_EXPERTS,
        constants={**_ALL_BLOCKS_HAVE_EXPERTS, "norm_topk_prob": False, "qkv_bias": True},
    ),
    Architecture(
        "qwen3moe",
        ("qwen3_moe",),
        "silu",
        settings=_EXPERTS,
        constants={**_ALL_BLOCKS_HAVE_EXPERTS, "norm_topk_prob": True, "attention_bias": False},
    ),
    Architecture("phi3", ("phi3",), "silu", always={"attention.sliding_window": 0}),
    Architecture("gemma", ("gemma",), "gelu_pytorch_tanh", norm_offset=1.0, constants={"attention_bias": False}),
    Architecture(
        "gemma2",
        ("gemma2",),
        "gelu_pytorch_tanh",
        norm_offset=1.0,
        full_every=2,
        settings={**_WINDOW, **_CAPS},
        constants={"attention_bias": False},
        scales_by_head=True,
    ),
    Architecture(
        "gemma3",
        ("gemma3_text",),
        "gelu_pytorch_tanh",
        norm_offset=1.0,
        full_every=6,
        settings=_WINDOW,
        constants={"attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"rope_local_base_freq": 10000.0},
        scales_by_head=True,
    ),
)


def architecture_of(model_type: str) -> Architecture | None:
    """The row of a model; None where the table has none."""
    return next((each for each in ARCHITECTURES if model_type in each.model_types), None)


def config_problem(config: Config) -> str | None:
    """Why llama.cpp would compute something else with this config; None: it does not.

    Everything checked here is what no key of the file can say: silently wrong otherwise.
    """
    family = str(config.get("model_type"))
    found = architecture_of(family)
    if found is None:
        known = ", ".join(name for each in ARCHITECTURES for name in each.model_types)
        return f"`{family}` is none of the architectures that are written ({known})"
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != found.activation:
        return f"llama.cpp computes {found.name} with `{found.activation}`, and this config says `{activation}`"
    for name, value in found.constants.items():
        if config.get(name, value) != value:
            return f"llama.cpp computes {found.name} with {name} = {value}, and this config says {config[name]}"
    scalar, size = config.get("query_pre_attn_scalar"), head_size(config)
    if found.scales_by_head and scalar not in (None, size):
        return f"llama.cpp divides by the root of the head's size ({size}), and this config says {scalar}"
    return _windows_problem(found, config) or rope_problem(config)


def settings_of(config: Config, by_block: Mapping[str, Setting] | None = None) -> dict[str, Setting]:
    """All keys of the metadata that describe the model; its config must have no `config_problem`.

    `by_block`: widths other than the config's; lists where blocks differ.
    """
    found = architecture_of(str(config["model_type"]))
    assert found is not None
    name = found.per_block if any(isinstance(each, list) for each in (by_block or {}).values()) else found.name
    size = head_size(config)
    named = {key: config.get(name) for key, name in {**_SHARED, **found.settings}.items()}
    stated: dict[str, Setting] = {key: value for key, value in named.items() if value is not None}
    stated |= {"attention.key_length": size, "attention.value_length": size, **rope_settings(config, size)}
    windows = [window for window in _windows(config) if window is not None]
    if windows and found.full_every is None:
        stated["context_length"] = min(int(config["max_position_embeddings"]), *windows)
    described = {f"{name}.{key}": value for key, value in {**stated, **found.always, **(by_block or {})}.items()}
    return {"general.architecture": str(name), **described}


def notes_of(config: Config) -> list[str]:
    """What the user should know about how the model is described."""
    found = architecture_of(str(config.get("model_type")))
    windows = [] if found is None else [each for each in _windows(config) if each]
    if found is None or not windows or found.full_every is not None:
        return []
    if min(windows) >= int(config["max_position_embeddings"]):
        return []
    return [
        f"llama.cpp computes no sliding window for {found.name}: the file states a context of {min(windows)} tokens, "
        "the length up to which both are the same"
    ]


def head_size(config: Config) -> int:
    """Of queries, keys and values alike."""
    stated = config.get("head_dim")
    return int(stated) if stated else int(config["hidden_size"]) // int(config["num_attention_heads"])


def _windows(config: Config) -> list[int | None]:
    """Per block, how far back its attention sees; None: everything."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if config.get("use_sliding_window") is False:
        window = None
    blocks = int(config["num_hidden_layers"])
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds[:blocks]]
    return [window] * blocks


def _windows_problem(found: Architecture, config: Config) -> str | None:
    every = found.full_every
    if every is None:
        return None
    expected = [
        "full_attention" if (block + 1) % every == 0 else "sliding_attention" for block in range(len(_windows(config)))
    ]
    stated = config.get("layer_types")
    if stated is not None and list(stated) != expected:
        return f"llama.cpp expects every {every}th block of {found.name} to attend to everything, and these do not"
    return None
