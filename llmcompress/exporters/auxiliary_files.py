"""Copies the files that accompany the weights: tokenizer, chat template, generation config, license."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmcompress.storage.json_file import read_json

_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_OTHERS = (
    "chat_template.*",
    "additional_chat_templates",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_auxiliary_files(
    source_folder: Path | None,
    destination: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
) -> tuple[str, ...]:
    """Copy them byte for byte from the source model; returns the names of all files that are now in `destination`.

    What the source lacks, or all of it without one, is written from the objects given. A tokenizer that transformers 5
    saved is respelled so that 4 reads it too; nothing else is changed.
    """
    for path in sorted(source_folder.iterdir()) if source_folder else ():
        if _matches(path.name, _TOKENIZER + _OTHERS):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, destination / path.name)
    if tokenizer is not None and not any(_matches(path.name, _TOKENIZER) for path in destination.iterdir()):
        tokenizer.save_pretrained(str(destination))
    if generation_config is not None and not (destination / "generation_config.json").exists():
        # not `save_pretrained`, which raises on settings that contradict each other
        generation_config.to_json_file(destination / "generation_config.json")
    _respell_tokenizer(destination / "tokenizer_config.json")
    return tuple(sorted(path.name for path in destination.iterdir()))


def _respell_tokenizer(path: Path) -> None:
    """Rename classes and lists of transformers 5 to those of 4; an older file is not changed."""
    if not path.is_file():
        return
    settings = read_json(path)
    respelled = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        respelled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        respelled["additional_special_tokens"] = respelled.pop("extra_special_tokens")
    if respelled != settings:
        path.write_text(json.dumps(respelled, indent=2, ensure_ascii=False) + "\n")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
