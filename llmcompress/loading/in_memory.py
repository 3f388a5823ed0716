"""A model in memory: checks that it can be compressed, and collects the facts that folders get from preflight."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.finite import refuse_not_finite_numbers
from llmcompress.loading.generation import usable_generation_config
from llmcompress.loading.match import Match
from llmcompress.loading.preflight import STORABLE, ModelFacts
from llmcompress.loading.source import IN_MEMORY
from llmcompress.loading.tensors import write_header
from llmcompress.loading.weights import refuse_not_finite
from llmcompress.modules.base import CompressedModule


@dataclass(frozen=True)
class LiveModel:
    """A dense model in memory, its tokenizer, and the facts about it before compression."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: ModelFacts

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> LiveModel:
        """Raises: CompressError for a model that cannot be compressed, or none to read text with."""
        found = dense_model(model)
        return cls(found, required_tokenizer(tokenizer), facts_in_memory(found))

    @property
    def name(self) -> str:
        """For reports and recipes: `memory:LlamaForCausalLM`. No path of this machine is in it."""
        return f"{IN_MEMORY}{type(self.model).__name__}"


def required_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Raises: CompressError if there is no tokenizer, or it is something else."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    found = "none was given" if tokenizer is None else f"a {type(tokenizer).__name__} was given"
    what = f"a model in memory needs its tokenizer, but {found}"
    raise _refused("no-tokenizer", what, "give `tokenizer=AutoTokenizer.from_pretrained(...)`")


def whole_model(model: nn.Module) -> PreTrainedModel:
    """The same model, if it is a complete transformers model with ordinary weights.

    Raises: CompressError saying how to get such a model.
    """
    _refuse_wrapped(model)
    if not isinstance(model, PreTrainedModel):
        what = f"a {type(model).__name__} is no model of transformers"
        raise _refused("other-class", what, "give what AutoModelForCausalLM.from_pretrained returns, or a folder")
    _refuse_elsewhere(model)
    return model


def dense_model(model: nn.Module) -> PreTrainedModel:
    """The same model, if it is a complete causal language model with ordinary weights.

    Raises: CompressError saying how to get such a model.
    """
    found = whole_model(model)
    _refuse_quantized(found)
    if any(isinstance(module, CompressedModule) for module in found.modules()):
        what = "this model was already compressed by llmcompress"
        raise _refused("already-compressed", what, "load the dense model again, and use one recipe with all passes")
    config = found.config
    if getattr(config, "is_encoder_decoder", False) or found.get_output_embeddings() is None:
        what = f"{type(found).__name__} does not predict the next token of a text"
        raise _refused("not-causal", what, "load it with AutoModelForCausalLM")
    return found


def facts_in_memory(model: PreTrainedModel) -> ModelFacts:
    """The same facts as preflight finds in a folder, for a model that `dense_model` accepted.

    Raises: CompressError for NaN or Inf in weights or settings.
    """
    refuse_not_finite_numbers(model.config.to_dict(), Path(model.name_or_path or "."))
    refuse_not_finite(model.state_dict(), {})
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _stored_once(model).items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    settings, notes = usable_generation_config(copy.deepcopy(model.generation_config), model.config)
    storage_dtype, dtype_notes = _storage_dtype(kinds)
    return ModelFacts(
        config=model.config,
        generation_config=settings,
        contents=Match(
            {name: shape for name, (_, shape) in kinds.items()},
            embedding_rows=embedding.weight.shape[0],
            tied=getattr(head, "weight", None) is embedding.weight,
            stored_twice=None,
            unused=(),
        ),
        storage_dtype=storage_dtype,
        bytes_weights=len(write_header(kinds)[0]) + sum(tensor.nbytes for tensor in _stored_once(model).values()),
        warnings=(*notes, *dtype_notes),
    )


def identity_in_memory(model: PreTrainedModel) -> dict[str, str]:
    """Hashes of the weights and of the configuration, as `preparation` makes them of files."""
    weights = hashlib.sha256()
    for name, tensor in _stored_once(model).items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    return {"weights": weights.hexdigest(), "config": config.hexdigest()}


def _stored_once(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the state; one that has two names under the first alone."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _storage_dtype(kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[torch.dtype, list[str]]:
    """The floating dtype of most numbers, and a note when there are several."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, shape in kinds.values():
        if dtype in STORABLE:
            counts[dtype] += torch.Size(shape).numel()
    if not counts:
        raise _refused("already-quantized", "the weights of this model are not floating-point numbers", _DENSE)
    usual = counts.most_common(1)[0][0]
    if len(counts) == 1:
        return usual, []
    called = [str(dtype).removeprefix("torch.") for dtype in (*counts, usual)]
    return usual, [f"the model mixes dtypes ({', '.join(called[:-1])}); the result is stored in {called[-1]}"]


_DENSE = "load the model that it was made from, in 16 or 32 bits, without a quantization_config"


def _refuse_wrapped(model: nn.Module) -> None:
    """Wrappers of other libraries: what they hold is the model."""
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise _refused("compiled", "this model is compiled with torch.compile", "give `model._orig_mod`")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise _refused("wrapped", f"this model is wrapped in {name}", "give `model.module`")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        what = "this model has adapters of peft beside its weights"
        raise _refused("adapter", what, "merge them first: `model = model.merge_and_unload()`")
    if (
        any(hasattr(p, "device_mesh") or hasattr(p, "_is_sharded") for p in model.parameters())
        or "FullySharded" in name
    ):
        what = "this model is sharded: each process holds a part of the weights"
        raise _refused("sharded", what, "load the whole model in this process with from_pretrained")


def _refuse_elsewhere(model: PreTrainedModel) -> None:
    """Weights on disk, on no device, or on several."""
    devices = {parameter.device for parameter in model.parameters()}
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if len(devices) > 1 or hooked or torch.device("meta") in devices:
        where = ", ".join(sorted(map(str, devices)))
        raise _refused(
            "spread",
            f"the weights are not in one place ({where}{', moved by hooks' if hooked else ''})",
            "load the model without `device_map`, or give its id or folder: weights can then be offloaded to disk",
        )


def _refuse_quantized(model: PreTrainedModel) -> None:
    config = getattr(model.config, "quantization_config", None)
    codes = [p for p in model.parameters() if not p.is_floating_point()]
    if config or codes or getattr(model, "hf_quantizer", None) is not None:
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        named = f": {getattr(method, 'value', method)}" if method else ""
        raise _refused("already-quantized", f"this model is already quantized{named}", _DENSE)


def _refused(code: str, what: str, fix: str) -> CompressError:
    return CompressError(f"model.{code}", what, fix=fix, saved="the model was not changed", exit_code=ExitCode.USAGE)
