"""Checks that a checkpoint has exactly the tensors that the model needs, from headers without weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.loading.files import shortened_list
from llmcompress.loading.quiet import loader_message, quiet_transformers
from llmcompress.loading.tensors import CODE_DTYPES, TensorHeader

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """The tensors of the model once it is loaded."""

    shapes: dict[str, Shape]
    """Every saved tensor, under transformers' name; a tied head is listed once."""
    embedding_rows: int
    tied: bool
    """Whether config.json ties the output head to the embedding."""
    stored_twice: tuple[str, str] | None
    """Names in the checkpoint of a tied embedding and head that are both stored."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that the model does not use."""


def match(config: PretrainedConfig, headers: Mapping[str, TensorHeader], *, trust_remote_code: bool = False) -> Match:
    """Let transformers load the checkpoint's headers as tensors on the meta device, with all its own renaming.

    Legacy prefixes, fused experts and ignorable keys are therefore handled by the loader that will load the weights.

    Raises: CompressError listing every tensor that is missing or has another shape than config.json says.
    """
    with quiet_transformers():
        model = empty_model(config, trust_remote_code=trust_remote_code)
        embedding, head = _name(model, model.get_input_embeddings()), _name(model, model.get_output_embeddings())
        rows = model.get_input_embeddings().weight.shape[0]
        seen: set[int] = set()
        shapes: dict[str, Shape] = {}
        for name, tensor in model.state_dict().items():
            if id(tied_to := _owner(model, name)) not in seen:
                seen.add(id(tied_to))
                shapes[name] = tuple(tensor.shape)
        unused = _load_headers(type(model), config, headers, shapes, head)
    twice = (_find(embedding, headers), _find(head, headers)) if embedding and head and embedding != head else ("", "")
    tied = bool(head) and _owner(model, head) is _owner(model, embedding)
    return Match(shapes, rows, tied, twice if tied and all(twice) else None, tuple(sorted(unused)))


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules without any weights.

    Raises: CompressError when transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        raise CompressError(
            "model.bad-config",
            f"transformers cannot build the model that config.json describes: {loader_message(problem)}",
            where=f"{config.name_or_path}/config.json",
            fix="compare it with the config.json of the original model",
        ) from problem
    model.tie_weights()
    return model


def missing_error(names: Iterable[str], where: str, *, head: str = "") -> CompressError:
    """Tensors that would be filled with random numbers."""
    names = sorted(names)
    fix = "download the whole checkpoint again, or correct config.json if it describes another model"
    if head in names:
        fix = f'if the output head is tied, set "tie_word_embeddings": true in config.json; otherwise {fix}'
    return CompressError(
        "model.missing-tensor",
        f"{len(names)} tensors of the model are missing from the checkpoint",
        where=f"{where}: {shortened_list(names)}",
        fix=fix,
    )


def _load_headers(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    headers: Mapping[str, TensorHeader],
    shapes: Mapping[str, Shape],
    head: str,
) -> list[str]:
    """Unused names."""
    folder = str(config.name_or_path)
    tensors = {
        # codes in place of a weight are the caller's to name; here they would only break the assignment
        name: torch.empty(header.shape, dtype=None if header.dtype in CODE_DTYPES else header.dtype, device="meta")
        for name, header in headers.items()
    }
    try:
        _, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map={"": "meta"},
        )
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        odd = _odd_experts(headers)
        raise CompressError(
            "model.wrong-shape" if odd else "model.unloadable",
            "the experts of a layer have different shapes"
            if odd
            else f"transformers cannot load it: {loader_message(problem)}",
            where=f"{folder}: {shortened_list(odd)}" if odd else folder,
            fix="download the whole checkpoint again, or correct config.json",
        ) from problem
    wrong = [_mismatch(entry, headers, shapes, config) for entry in info["mismatched_keys"]]
    if wrong:
        raise CompressError(
            "model.wrong-shape",
            f"{len(wrong)} tensors do not have the shape that config.json implies",
            where=f"{folder}: {'; '.join(sorted(wrong)[:12])}{_odd_note(headers)}",
            fix="use the config.json that belongs to this checkpoint, or download the checkpoint again",
        )
    if info["missing_keys"]:
        raise missing_error(info["missing_keys"], folder, head=head)
    return list(info["unexpected_keys"])


def _mismatch(
    entry: Any, headers: Mapping[str, TensorHeader], shapes: Mapping[str, Shape], config: PretrainedConfig
) -> str:
    """`name: [7, 5] in the checkpoint, [64, 32] expected (…)`; of the entry, transformers 4 gives only the name."""
    name = entry if isinstance(entry, str) else entry[0]
    stored = _find(name, headers)
    found = headers[stored].shape if stored else () if isinstance(entry, str) else tuple(entry[1])
    expected = shapes.get(name, ())
    wanted = {length for i, length in enumerate(expected) if len(found) != len(expected) or found[i] != length}
    fields = [f"{key} = {value}" for key, value in config.to_dict().items() if type(value) is int and value in wanted]
    because = f" (config.json: {', '.join(fields[:3])})" if fields else ""
    return f"{stored or name}: {list(found)} in the checkpoint, {list(expected)} expected{because}"


def _odd_experts(headers: Mapping[str, TensorHeader]) -> list[str]:
    """Experts that lack a tensor their siblings have, or hold it in another shape."""
    siblings: dict[tuple[str, str], dict[int, Shape]] = defaultdict(dict)
    experts: dict[str, set[int]] = defaultdict(set)
    for name, header in headers.items():
        before, mark, after = name.partition(".experts.")
        digits, _, rest = after.partition(".")
        if mark and digits.isdigit():
            siblings[before, rest][int(digits)] = header.shape
            experts[before].add(int(digits))
    odd = []
    for (before, rest), by_expert in siblings.items():
        usual = Counter(by_expert.values()).most_common(1)[0][0]
        for number in sorted(experts[before]):
            name = f"{before}.experts.{number}.{rest}"
            if number not in by_expert:
                odd.append(f"{name} is missing")
            elif by_expert[number] != usual:
                odd.append(f"{name} is {list(by_expert[number])}, the others are {list(usual)}")
    return odd


def _odd_note(headers: Mapping[str, TensorHeader]) -> str:
    odd = _odd_experts(headers)
    return f"; {shortened_list(odd)}" if odd else ""


def _owner(model: nn.Module, name: str) -> object:
    """The parameter or buffer itself: tied names lead to the same one."""
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def _name(model: nn.Module, module: nn.Module | None) -> str:
    return next((f"{name}.weight" for name, found in model.named_modules() if found is module), "")


def _find(name: str, headers: Mapping[str, TensorHeader]) -> str:
    """The tensor's name in the checkpoint, which may lack a prefix; empty when it is not there."""
    return name if name in headers else next((stored for stored in headers if name.endswith(f".{stored}")), "")
