"""Loads the model's tokenizer from its folder, with any version of transformers."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.loading.quiet import loader_message, quiet_transformers
from llmcompress.storage.json_file import read_json

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


def read_tokenizer(
    folder: Path, config: PretrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer; never prompts, never looks at the Hub.

    Raises: CompressError when there is none or it cannot be read.
    """
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise CompressError(
            "model.no-tokenizer",
            "the model has no tokenizer",
            where=f"{folder}: none of {', '.join(_VOCABULARIES)}",
            fix="put the tokenizer files of the original model into the folder",
        )
    try:
        with quiet_transformers():
            if _written_by_transformers_5(folder) and not hasattr(transformers, "TokenizersBackend"):
                fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
                return fast
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
            )
            found("a")  # a setting of a wrong type is only noticed when it is used
            return found
    except CompressError:
        raise
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        needs_sentencepiece = not (folder / "tokenizer.json").exists() and any(folder.glob("*.model"))
        raise CompressError(
            "model.bad-tokenizer",
            f"the tokenizer cannot be read: {loader_message(problem)}",
            where=str(folder),
            fix=(
                "pip install 'llmcompress[sentencepiece]'"
                if needs_sentencepiece
                else "download tokenizer.json and tokenizer_config.json again"
            ),
        ) from problem


def _written_by_transformers_5(folder: Path) -> bool:
    """transformers 5 names a class that 4 does not have; its files are those of a fast tokenizer."""
    file = folder / "tokenizer_config.json"
    return file.exists() and read_json(file).get("tokenizer_class") == "TokenizersBackend"
