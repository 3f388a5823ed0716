"""Loads a model: for compression (checked, in one dtype), or a finished result, ready to generate."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.loading.config import read_config
from llmcompress.loading.generation import read_generation_config
from llmcompress.loading.mapped import MappedWeights, map_weights
from llmcompress.loading.match import empty_model, missing_error
from llmcompress.loading.preflight import ModelFacts, Preflight, preflight
from llmcompress.loading.quiet import loader_message, quiet_transformers
from llmcompress.loading.source import Source, find_source
from llmcompress.loading.tensors import TensorHeader, headers
from llmcompress.loading.tokenizer import read_tokenizer
from llmcompress.loading.weights import refuse_contradicting_head, refuse_not_finite
from llmcompress.progress import Progress


class ModelAndTokenizer(NamedTuple):
    """A model ready to generate: `model, tokenizer = load(...)`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A checked model, to be compressed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """What the user called it; `memory:CLASS` of one that was in memory already."""
    folder: Path | None
    """Where it was read from; None: it was in memory already."""
    preflight: ModelFacts
    weights: MappedWeights | None = None
    """The memory-mapped weights, if the model is offloaded."""
    commit: str | None = None
    """On the Hub; None: it came from somewhere else."""


def load_for_compression(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    scratch: Path | None = None,
    checked: Preflight | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Check everything, then read the weights.

    float32 by default: bfloat16 computes several times slower on processors without its instructions. What the
    result will be stored in is `preflight.storage_dtype`. With `scratch`, a folder that must live as long as the model,
    weights stay in their files, in the files' dtypes, and take memory only where they are used. `checked`: what the
    preflight of this source found, where it was made already.

    Raises: CompressError for any fault of the model.
    """
    checked = checked or preflight(source, trust_remote_code=trust_remote_code, progress=progress)
    if scratch is None:
        model = _load(source, checked, dtype, trust_remote_code)
        return Loaded(model, checked.tokenizer, source.name, source.folder, checked, commit=source.revision)
    return _load_mapped(source, checked, scratch, trust_remote_code)


def load_model(source: Source, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The checked model alone, in eval mode, on the CPU.

    Raises: CompressError for any fault of the model.
    """
    return load_for_compression(source, dtype=dtype, trust_remote_code=trust_remote_code).model


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises: CompressError when there is none or it cannot be read.
    """
    config, _ = read_config(source.folder, trust_remote_code=trust_remote_code, may_be_quantized=True)
    return read_tokenizer(source.folder, config, trust_remote_code=trust_remote_code)


def load(
    path_or_id: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> ModelAndTokenizer:
    """A finished result, dense or compressed-tensors, ready to generate.

    Raises: CompressError when a tensor is missing: transformers would fill it with random numbers.
    """
    source = find_source(str(path_or_id))
    config, _ = read_config(source.folder, may_be_quantized=True)
    _refuse_other_runtime(config, source.folder)
    found = headers(source.folder, how_to_get_again=source.how_to_get_again)
    _refuse_incomplete_codes(found, source.folder)
    only_bfloat16 = _restores_to_bfloat16(config)
    try:
        model = _from_pretrained(source.folder, config, "auto" if only_bfloat16 else dtype, trust_remote_code=False)
    except CompressError as problem:
        raise _explained(problem, config, found, source.folder) from problem
    if model.can_generate():
        model.generation_config, _ = read_generation_config(source.folder, config)
    if only_bfloat16 and dtype not in ("auto", torch.bfloat16):
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # codes become weights in the first forward
        model.to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if model.device != torch.device(device):  # transformers 4 refuses `to` for bitsandbytes in 8 bits, whatever it says
        model.to(device)
    return ModelAndTokenizer(model, read_tokenizer(source.folder, config))


def _refuse_other_runtime(config: PretrainedConfig, folder: Path) -> None:
    """ModelOpt's folders: transformers reads their codes as weights, without a scale and without an error."""
    found = getattr(config, "quantization_config", None) or {}
    if isinstance(found, dict) and str(found.get("quant_method", "")).startswith("modelopt"):
        raise CompressError(
            "model.other-runtime",
            "these are weights for TensorRT-LLM (ModelOpt's format); PyTorch would read the codes without their scales",
            where=str(folder),
            fix=f"serve them with `trtllm-serve {folder}`, or give the folder that was exported",
        )


def _restores_to_bfloat16(config: PretrainedConfig) -> bool:
    """MX and NVFP4 in a compressed-tensors folder: the library's decompressors know no other dtype."""
    found = getattr(config, "quantization_config", None) or {}
    groups = found.get("config_groups") if isinstance(found, dict) else None
    named = [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    return any(str(group.get("format", "")).startswith(("mxfp", "nvfp")) for group in named)


def _load(source: Source, checked: Preflight, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    refuse_contradicting_head(checked)
    model = _from_pretrained(source.folder, checked.config, dtype, trust_remote_code=trust_remote_code)
    model.generation_config = checked.generation_config
    refuse_not_finite(model.state_dict(), checked.headers)
    return model


def _load_mapped(source: Source, checked: Preflight, scratch: Path, trust_remote_code: bool) -> Loaded:
    refuse_contradicting_head(checked)
    model, weights = map_weights(
        source.folder, checked.config, scratch, dtype=checked.storage_dtype, trust_remote_code=trust_remote_code
    )
    model.generation_config = checked.generation_config
    refuse_not_finite(weights, checked.headers)
    return Loaded(model, checked.tokenizer, source.name, source.folder, checked, weights, source.revision)


def _from_pretrained(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype | str, *, trust_remote_code: bool
) -> PreTrainedModel:
    """transformers' loader with our configuration object, so that config.json's own is never used.

    Attention is transformers' choice for a clean configuration: sdpa where the architecture has it.
    """
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    except CompressError:  # of our own quantizer: a damaged archive
        raise
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        raise CompressError(
            "model.unloadable",
            f"transformers cannot load it: {loader_message(problem)}",
            where=str(folder),
            fix="download the whole model again",
        ) from problem
    if info["missing_keys"]:
        raise missing_error(info["missing_keys"], str(folder))
    loaded: PreTrainedModel = model.eval()
    return loaded


def _explained(problem: CompressError, config: PretrainedConfig, found: Iterable[str], folder: Path) -> CompressError:
    """The linears of which the files hold nothing at all, if that is why loading failed."""
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    with quiet_transformers():
        model = empty_model(plain)
    shared = model.get_input_embeddings().weight
    linears = [n for n, part in model.named_modules() if isinstance(part, nn.Linear) and part.weight is not shared]
    there = {name.rpartition(".")[0] for name in found}
    lost = [name for name in linears if name not in there]
    if problem.code == "model.unloadable" and lost and len(lost) < len(linears) / 2:
        return missing_error([f"{name}.weight" for name in lost], str(folder))
    return problem


def _refuse_incomplete_codes(found: Mapping[str, TensorHeader], folder: Path) -> None:
    """Codes without scales or scales without codes: loaders disagree on whether they notice."""
    names = set(found)
    missing: set[str] = set()
    for name in names:
        site, _, part = name.rpartition(".")
        if part == "weight_packed":
            # two floats a byte need no note of their number
            packed_integers = found[name].dtype == torch.int32
            missing |= {f"{site}.weight_scale", *([f"{site}.weight_shape"] if packed_integers else [])} - names
        elif part == "weight_scale" and found[name].dtype == torch.float8_e4m3fn:
            missing |= {f"{site}.weight_packed", f"{site}.weight_global_scale"} - names
        elif part == "weight_scale" and not {f"{site}.weight", f"{site}.weight_packed"} & names:
            missing.add(f"{site}.weight_packed")
    if missing:
        raise missing_error(missing, str(folder))
