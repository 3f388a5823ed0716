"""A GGUF file as an ordinary folder, read once by transformers and kept in the cache; all else works with that.

Weights are those of the file, dequantized: float32 holds every product of its codes and scales. Config and tokenizer
are those beside the file where there are some; what the file says of them is less (docs/decisions/0033).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.loading.quiet import loader_message, quiet_transformers
from llmcompress.loading.versions import TRANSFORMERS_MAJOR
from llmcompress.storage.paths import cache_folder

_KEPT = 3
"""Converted files; those that were not used for longest go first."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_MODEL_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")
_CONFIG_MARKS = ("quantization_config", "_pre_quantization_dtype")
"""Attributes by which transformers marks a model that a quantizer loaded, and its config."""
_UNREAD = ("rope_freqs.weight", ".rope.scaling.type")
"""Of the file's tensors and keys, what transformers drops in silence: with them, positions are others."""


def converted_folder(file: Path) -> Path:
    """The folder in which transformers' reading of this file is kept; made when it is asked for first.

    Raises: CompressError where transformers cannot read the file, or would read another model from it.
    """
    facts = file.stat()
    beside = [
        path.stat().st_mtime_ns for name in ("config.json", *_TOKENIZER_FILES) if (path := file.parent / name).is_file()
    ]
    known = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {beside} {TRANSFORMERS_MAJOR}"
    kept = cache_folder() / "gguf"
    folder = kept / hashlib.sha256(known.encode()).hexdigest()[:16]
    if folder.is_dir():
        os.utime(folder)
        return folder
    kept.mkdir(parents=True, exist_ok=True)
    _forget(kept, _KEPT - 1)
    scratch = Path(tempfile.mkdtemp(prefix="converting-", dir=kept))
    try:
        _convert(file, scratch)
        if not folder.is_dir():
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    keys, types = _contents(file)
    config = _config(file, keys)
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent,
                config=config,
                dtype=_dtype(types),
                output_loading_info=True,
                **options,
                **_dequantized(),
            )
            beside = any((file.parent / name).is_file() for name in _TOKENIZER_FILES)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **({} if beside else options))
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        raise _unreadable(file, loader_message(problem)) from problem
    if found["missing_keys"]:
        names = sorted(map(str, found["missing_keys"]))
        raise _unreadable(file, f"{len(names)} tensors are missing, such as {names[0]}")
    _obey_bos(tokenizer, keys)
    as_ordinary(model)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def as_ordinary(model: PreTrainedModel) -> None:
    """Take off the marks of a quantizer that only read the files: its result is an ordinary model."""
    for mark in _MODEL_MARKS:
        model.__dict__.pop(mark, None)
    for mark in _CONFIG_MARKS:
        model.config.__dict__.pop(mark, None)


def _obey_bos(tokenizer: PreTrainedTokenizerBase, keys: dict[str, Any]) -> None:
    """Whether texts begin with BOS is said by the file; transformers 4 goes by the tokenizer's class."""
    stated = keys.get("tokenizer.ggml.add_bos_token")
    if stated is not None and hasattr(tokenizer, "add_bos_token"):
        tokenizer.add_bos_token = tokenizer.init_kwargs["add_bos_token"] = bool(stated)


def _dequantized() -> dict[str, Any]:
    """transformers 5 can keep blocks packed, for its own kernels; 4 always dequantizes them."""
    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def _config(file: Path, keys: dict[str, Any]) -> PretrainedConfig:
    """The one beside the file, or what transformers makes of the file's metadata, with what it forgets.

    Raises: CompressError where the file says something that transformers would not compute.
    """
    if (file.parent / "config.json").is_file():
        found: PretrainedConfig = AutoConfig.from_pretrained(file.parent, local_files_only=True)
        found.__dict__.pop("quantization_config", None)
        return found
    dropped = [name for name in keys if name.endswith(_UNREAD)]
    if dropped:
        raise _unreadable(file, f"transformers does not read its `{dropped[0]}`, without which positions are others")
    try:
        with quiet_transformers():
            found = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as problem:
        raise _unreadable(file, loader_message(problem)) from problem
    size = keys.get(f"{keys.get('general.architecture')}.attention.key_length")
    if size is not None and hasattr(found, "head_dim"):
        found.head_dim = int(size)
    if found.pad_token_id is not None and found.pad_token_id >= found.vocab_size:
        found.pad_token_id = None  # the default of the class, for another vocabulary
    return found


def _contents(file: Path) -> tuple[dict[str, Any], set[str]]:
    """Keys of the metadata with single values (and names of tensors, without), and the types of all tensors.

    Raises: CompressError where it is no GGUF file, or the package that reads it is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as problem:
        what, fix = "GGUF files are read by the package `gguf`, which is not installed", "pip install llmcompress[gguf]"
        raise CompressError("model.gguf-package", what, where=str(file), fix=fix) from problem
    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError) as problem:
        raise _unreadable(file, str(problem)) from problem
    keys = {name: field.contents() if len(field.data) == 1 else None for name, field in reader.fields.items()}
    return {**{str(each.name): None for each in reader.tensors}, **keys}, {
        each.tensor_type.name for each in reader.tensors
    }


def _dtype(types: set[str]) -> torch.dtype:
    """Of files without codes, the 16-bit type of their matrices; vectors are float32 that came from it."""
    if types <= {"F32", "BF16"} and "BF16" in types:
        return torch.bfloat16
    return torch.float16 if types <= {"F32", "F16"} and "F16" in types else torch.float32


def _forget(kept: Path, most: int) -> None:
    folders = sorted((path for path in kept.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in folders[: max(0, len(folders) - most)]:
        shutil.rmtree(folder, ignore_errors=True)


def _unreadable(file: Path, why: str) -> CompressError:
    return CompressError(
        "model.gguf",
        f"the GGUF file cannot be read: {why}",
        where=str(file),
        fix="put the model's config.json and tokenizer.json beside the file, or use the model that it was made from",
    )
