"""All checks that can be made before any work: files, config, tensors, tokenizer, generation config."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from llmcompress.errors import CompressError
from llmcompress.loading.config import read_config
from llmcompress.loading.files import shortened_list
from llmcompress.loading.finite import refuse_not_finite_numbers
from llmcompress.loading.generation import read_generation_config
from llmcompress.loading.match import Match, match
from llmcompress.loading.quiet import quiet_transformers
from llmcompress.loading.source import Source
from llmcompress.loading.tensors import CODE_DTYPES, TensorHeader, headers
from llmcompress.loading.tokenizer import read_tokenizer
from llmcompress.progress import Progress, Silent

STORABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights of a dense model may be."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a dense model before any work, wherever it is."""

    config: PretrainedConfig
    """Of a folder: clean, no key of it chooses code to run."""
    generation_config: GenerationConfig
    """Valid: it can be saved."""
    contents: Match
    """The model's tensors, under the names transformers gives them."""
    storage_dtype: torch.dtype
    """The dtype of most weights, in which the result is stored."""
    bytes_weights: int
    """Size of the weight files, or of the one that would be written."""
    warnings: tuple[str, ...]
    """Notes and warnings for the user."""


@dataclass(frozen=True, kw_only=True)
class Preflight(ModelFacts):
    """A folder that passed, without a weight having been read."""

    tokenizer: PreTrainedTokenizerBase
    headers: dict[str, TensorHeader]
    """The checkpoint's tensors, under their names in the files."""


def preflight(source: Source, *, trust_remote_code: bool = False, progress: Progress | None = None) -> Preflight:
    """Check the model without reading a weight; a second at most for a large one.

    Raises: CompressError (exit code 3) for the first kind of problem, listing all places where it occurs.
    """
    progress = progress or Silent()
    progress.substep("config.json")
    config, notes = read_config(source.folder, trust_remote_code=trust_remote_code)
    refuse_not_finite_numbers(config.to_dict(), source.folder)
    with quiet_transformers():
        generation_config, generation_notes = read_generation_config(source.folder, config)
    progress.substep("safetensors headers")
    found = headers(source.folder, how_to_get_again=source.how_to_get_again)
    contents = match(config, found, trust_remote_code=trust_remote_code)
    storage_dtype, dtype_notes = _storage_dtype({n: h for n, h in found.items() if n not in contents.unused})
    progress.substep("tokenizer")
    tokenizer = read_tokenizer(source.folder, config, trust_remote_code=trust_remote_code)
    token_notes = [*_vocabulary_notes(tokenizer, contents), *_token_notes(tokenizer)]
    warnings = [*notes, *generation_notes, *dtype_notes, *_content_notes(contents), *token_notes]
    for warning in warnings:
        progress.note(warning)
    files = {header.file for header in found.values()}
    return Preflight(
        config=config,
        generation_config=generation_config,
        tokenizer=tokenizer,
        headers=found,
        contents=contents,
        storage_dtype=storage_dtype,
        bytes_weights=sum(file.stat().st_size for file in files),
        warnings=tuple(warnings),
    )


def _storage_dtype(found: dict[str, TensorHeader]) -> tuple[torch.dtype, list[str]]:
    """The floating dtype of most bytes, and a note when there are several."""
    by_dtype: Counter[torch.dtype] = Counter()
    tensors: Counter[torch.dtype] = Counter()
    for header in found.values():
        by_dtype[header.dtype] += header.bytes
        tensors[header.dtype] += 1
    packed = [name for name, header in found.items() if header.dtype in CODE_DTYPES and len(header.shape) > 1]
    if packed or not any(dtype in STORABLE for dtype in by_dtype):
        raise CompressError(
            "model.already-quantized",
            "the weights are quantized codes, but config.json has no quantization_config",
            where=shortened_list([f"{name} ({str(found[name].dtype).removeprefix('torch.')})" for name in packed]),
            fix="compress the original 16-bit model instead",
        )
    usual = max((dtype for dtype in by_dtype if dtype in STORABLE), key=lambda dtype: by_dtype[dtype])
    floats = [dtype for dtype in tensors if dtype in STORABLE]
    if len(floats) == 1:
        return usual, []
    table = ", ".join(f"{str(dtype).removeprefix('torch.')}: {tensors[dtype]} tensors" for dtype in floats)
    return usual, [
        f"the checkpoint mixes dtypes ({table}); the result is stored in {str(usual).removeprefix('torch.')}"
    ]


def _vocabulary_notes(tokenizer: PreTrainedTokenizerBase, contents: Match) -> list[str]:
    """Tokens without a row, such as the image token of Gemma 3's text models: no harm until a text has one."""
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= contents.embedding_rows)
    if not beyond:
        return []
    tokens = shortened_list([f"{token!r} = {number}" for number, token in beyond], 4)
    return [
        f"the embedding has {contents.embedding_rows} rows, and {len(beyond)} tokens of the tokenizer have none "
        f"({tokens}); texts that contain one are refused"
    ]


def _content_notes(contents: Match) -> list[str]:
    if not contents.unused:
        return []
    names = shortened_list(list(contents.unused), 4)
    return [f"{len(contents.unused)} tensors of the checkpoint are not used by the model and are dropped: {names}"]


def _token_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        return ["the tokenizer has neither an end-of-text nor a padding token; calibration does not need them"]
    return []
