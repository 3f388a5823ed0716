"""config.json → a config that is safe to build a model from, or the reason why it is refused."""

from __future__ import annotations

import hashlib
import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmcompress.errors import CompressError
from llmcompress.loading.files import adapter_error, refuse_outside
from llmcompress.loading.quiet import loader_message, quiet_transformers
from llmcompress.loading.rotary import rotary_as_in_4
from llmcompress.loading.sizes import check_sizes
from llmcompress.loading.versions import TRANSFORMERS_MAJOR
from llmcompress.storage.json_file import read_json

_OWN_NOTES = {"_name_or_path", "_model_name_or_path", "_commit_hash", "_attn_implementation_autoset"}
_OWN_NOTES |= {"_from_model_config", "_auto_class"}
"""Left behind by transformers or training tools; dropped without a word."""
_CODE_SELECTING = {"fusion_config", "kernel_config"}
"""As every `…_implementation`: may name a repository of kernels that transformers would download and run."""


def read_config(
    folder: Path, *, trust_remote_code: bool = False, may_be_quantized: bool = False
) -> tuple[PretrainedConfig, list[str]]:
    """The configuration of a causal language model, cleaned of keys that choose code, and notes about what was done.

    Raises: CompressError for anything that is not a dense causal language model which transformers can build.
    """
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise adapter_error(str(folder), str(base or "BASE"))
    if not (folder / "config.json").exists():
        raise _no_config(folder)
    refuse_outside(
        folder, {path.name: path.name for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja")}
    )
    raw = read_json(folder / "config.json")
    _refuse_other_types(raw, folder)
    if not may_be_quantized:
        _refuse_quantized(raw, folder)
    notes: list[str] = []
    data = _without_code_keys(raw, notes, declared=_declared_keys(raw))
    _refuse_other_kinds(data, folder)
    code = data.get("auto_map")
    model_type = str(data.get("model_type", ""))
    native = model_type in transformers.CONFIG_MAPPING
    if code and not trust_remote_code:
        if not native:
            raise _needs_code(folder, model_type, code)
        del data["auto_map"]
        notes.append(f"config.json names custom Python files; they are ignored, and transformers' {model_type} is used")
    elif code:
        _refuse_code_from_elsewhere(folder, code)
        notes.append(f"Python files that come with the model run: {'; '.join(_hashes(folder))}")
    if not native and not code:
        raise _unknown_type(folder, model_type)
    if not code and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _not_causal(folder, f"model_type {model_type!r}")
    return _build(_for_installed_transformers(data), folder), notes


def _build(data: dict[str, Any], folder: Path) -> PretrainedConfig:
    try:
        with quiet_transformers():
            config: PretrainedConfig = _config_class(data, folder).from_dict(data)
    except CompressError:
        raise
    except Exception as problem:
        raise CompressError(
            "model.bad-config",
            f"transformers cannot read config.json: {loader_message(problem)}",
            where=str(folder / "config.json"),
            fix="compare it with the config.json of the original model",
        ) from problem
    config.name_or_path = str(folder)
    config.return_dict = True  # results are read by name, whatever a file says
    check_sizes(config, folder)
    return config


def _config_class(data: dict[str, Any], folder: Path) -> type[PretrainedConfig]:
    named = (data.get("auto_map") or {}).get("AutoConfig")
    if named:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        found: type[PretrainedConfig] = get_class_from_dynamic_module(named, str(folder))
        return found
    known: type[PretrainedConfig] = transformers.CONFIG_MAPPING[data["model_type"]]
    return known


def _declared_keys(raw: dict[str, Any]) -> set[str]:
    """Underscored options of the architecture itself: OPT's `_remove_final_layer_norm`, Gemma 3's
    `_sliding_window_pattern`."""
    model_type = raw.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        return set()
    kind = transformers.CONFIG_MAPPING[model_type]
    names = {*inspect.signature(kind.__init__).parameters}
    with suppress(Exception):  # a few need arguments
        names |= vars(kind()).keys() - vars(PretrainedConfig()).keys()
    return {name for name in names if name.startswith("_")}


def _chooses_code(key: str) -> bool:
    return "_implementation" in key or key in _CODE_SELECTING


def _without_code_keys(
    value: Any, notes: list[str], *, declared: set[str] | frozenset[str] = frozenset(), path: str = ""
) -> Any:
    """A copy without keys that can choose code to run, at any depth.

    transformers sets every key of config.json as an attribute: `_attn_implementation_internal: org/repo` ran that
    repository's code in transformers 4.56 … 5.2 (CVE-2026-4372).
    """
    if isinstance(value, list):
        return [_without_code_keys(item, notes, path=path) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if key in _OWN_NOTES:
            continue
        if _chooses_code(key):
            notes.append(f"config.json: the key {path}{key} was ignored (it can select code to run)")
            continue
        if key.startswith("_") and key not in declared:
            notes.append(
                f"config.json: the key {path}{key} was ignored (this version of transformers has no such option)"
            )
            continue
        kept[key] = _without_code_keys(item, notes, path=f"{path}{key}.")
    return kept


def _for_installed_transformers(data: dict[str, Any]) -> dict[str, Any]:
    """Add rotary settings in the form of transformers 4, if 4 is installed, to a config written by 5."""
    if TRANSFORMERS_MAJOR >= 5:
        return data
    return rotary_as_in_4(data.get("rope_parameters")) | data


def _refuse_quantized(raw: dict[str, Any], folder: Path) -> None:
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not found:
        return
    method = str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"
    bits = found.get("bits") if isinstance(found, dict) else None
    raise CompressError(
        "model.already-quantized",
        f"this model is already quantized: {method}{f', {bits} bits' if bits else ''}",
        where=f"{folder / 'config.json'}, quantization_config",
        fix="compress the original model instead (`base_model` in the model card names it)",
    )


def _refuse_other_kinds(data: dict[str, Any], folder: Path) -> None:
    """Vision-language, encoder-decoder and classification models, by what config.json says of itself."""
    towers = [key for key in ("vision_config", "audio_config") if data.get(key)]
    if towers:
        raise _not_causal(folder, f"a multimodal model ({', '.join(towers)})")
    if data.get("is_encoder_decoder"):
        raise _not_causal(folder, f"an encoder-decoder model ({data.get('model_type')})")
    classes = [str(name) for name in data.get("architectures") or []]
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    # base classes (`OPTModel`) pass: whether their head can be had is seen from the tensors
    if classes and all("For" in name and "ForCausalLM" not in name and name not in known for name in classes):
        raise _not_causal(folder, ", ".join(classes))


def _refuse_other_types(raw: dict[str, Any], folder: Path) -> None:
    """The few keys that are read before transformers checks the rest, and those that it does not check."""
    wanted: dict[str, tuple[type, str]] = {
        "model_type": (str, "text"),
        "architectures": (list, "a list"),
        "auto_map": (dict, "an object"),
        "quantization_config": (dict, "an object"),
        "rope_parameters": (dict, "an object"),
        "rope_scaling": (dict, "an object"),
        "text_config": (dict, "an object"),
        "output_hidden_states": (bool, "true or false"),
        "output_attentions": (bool, "true or false"),
        "use_cache": (bool, "true or false"),
        "return_dict": (bool, "true or false"),
    }
    for key, (kind, called) in wanted.items():
        if raw.get(key) is not None and not isinstance(raw[key], kind):
            raise CompressError(
                "model.bad-config",
                f"{key} is {raw[key]!r:.60}, but it must be {called}",
                where=f"{folder / 'config.json'}, {key}",
                fix="compare it with the config.json of the original model",
            )


def _not_causal(folder: Path, what: str) -> CompressError:
    return CompressError(
        "model.not-causal",
        f"this is {what}; only causal language models can be compressed",
        where=str(folder / "config.json"),
        fix="give a model whose config.json names an architecture …ForCausalLM",
    )


def _no_config(folder: Path) -> CompressError:
    if (folder / "model_index.json").exists():
        return _not_causal(folder, "a diffusion pipeline (model_index.json)")
    return CompressError(
        "model.no-config", "there is no config.json", where=str(folder), fix="give the folder of a complete model"
    )


def _unknown_type(folder: Path, model_type: str) -> CompressError:
    installed = transformers.__version__
    if not model_type:
        what = "config.json has no model_type, so the architecture is unknown"
        fix = 'add the model_type of the original model, e.g. "model_type": "llama"'
    else:
        what = f"transformers {installed} does not know the model_type {model_type!r}"
        fix = "check the spelling; a newer model needs a newer transformers: pip install -U transformers"
    return CompressError("model.unknown-type", what, where=str(folder / "config.json"), fix=fix)


def _needs_code(folder: Path, model_type: str, code: Any) -> CompressError:
    files = _hashes(folder)
    named = ", ".join(sorted(str(name) for name in code.values())) if isinstance(code, dict) else str(code)
    return CompressError(
        "model.remote-code",
        f"the model_type {model_type!r} needs Python files that come with the model ({named}); they were not run",
        where="; ".join(files) or f"{folder / 'config.json'}, auto_map",
        fix="review the files, then set `trust_remote_code: true` (for a Hub model with the full commit as `revision`)",
    )


def _hashes(folder: Path) -> list[str]:
    """Every Python file of the model, by what is in it."""
    return [
        f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        for path in sorted(folder.glob("*.py"))
    ]


def _refuse_code_from_elsewhere(folder: Path, code: dict[str, Any]) -> None:
    """`ORG/NAME--file.Class` is code of another repository, at whatever commit it has today."""
    elsewhere = sorted(str(name) for name in code.values() if "--" in str(name))
    if elsewhere:
        raise CompressError(
            "model.code-elsewhere",
            f"config.json needs Python code of another repository ({', '.join(elsewhere)}) without pinning a commit",
            where=f"{folder / 'config.json'}, auto_map",
            fix="copy those files into the model's folder, review them, and remove `ORG/NAME--` from auto_map",
        )
