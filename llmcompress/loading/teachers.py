"""Teachers of a distillation by name: found, compared with the student before any weight is read, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.config import read_config
from llmcompress.loading.identity import identity_of_folder
from llmcompress.loading.load import load_model, load_tokenizer
from llmcompress.loading.source import Source, find_source

ORIGINAL = "original"
"""The name of the model that a recipe compresses, as it was before."""


class Teachers(Protocol):
    """What a pass may ask about a teacher; the name is `original`, a Hub id or a folder."""

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Read now, on the CPU."""

    def identity(self, name: str) -> Mapping[str, str]:
        """Hashes of what decides what it computes."""

    def vocabulary(self, name: str) -> int:
        """Number of its logits, padding included."""

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Its tokenizer; that of `original` is the student's."""


class TeacherFiles:
    """Teachers in files. Every call reads anew: a model is not kept longer than its user keeps it."""

    def __init__(
        self,
        original: str | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`tokenizer`: of a student that is in no file."""
        self._original, self._revision, self._trust = original, revision, trust_remote_code
        self._tokenizer = tokenizer

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Raises: CompressError for any fault of the model."""
        source, trusted = self._source(name)
        return load_model(source, dtype=dtype, trust_remote_code=trusted)

    def identity(self, name: str) -> Mapping[str, str]:
        """Reads all of its files."""
        return identity_of_folder(self._source(name)[0].folder)

    def vocabulary(self, name: str) -> int:
        """As its config says."""
        source, trusted = self._source(name)
        config, _ = read_config(source.folder, trust_remote_code=trusted)
        size: int = config.get_text_config().vocab_size
        return size

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Read from its files, unless it was handed over with the student."""
        if name == ORIGINAL and self._tokenizer is not None:
            return self._tokenizer
        source, trusted = self._source(name)
        return load_tokenizer(source, trust_remote_code=trusted)

    def check(self, name: str, tokenizer: PreTrainedTokenizerBase, *, mapped: bool = False) -> None:
        """That its tokenizer gives every token the number that the student's does; embeddings may be padded.

        With `mapped` the numbers may differ.

        Raises: CompressError otherwise, and where there is no such model.
        """
        source, trusted = self._source(name)
        if name == ORIGINAL:
            return
        theirs, mine = load_tokenizer(source, trust_remote_code=trusted).get_vocab(), tokenizer.get_vocab()
        if theirs == mine or mapped:
            return
        other = sorted(token for token in theirs.keys() | mine.keys() if theirs.get(token) != mine.get(token))
        raise CompressError(
            "training.vocabulary",
            f"{name} has another vocabulary than the student: {len(theirs)} and {len(mine)} tokens, "
            f"{len(other)} of them different, such as {other[0]!r}",
            where="teacher",
            fix="use a teacher with the same tokenizer, or set `vocabulary` in `distill`",
            exit_code=ExitCode.USAGE,
        )

    def _source(self, name: str) -> tuple[Source, bool]:
        if name != ORIGINAL:
            return find_source(name), False
        if self._original is None:
            raise CompressError(
                "training.original",
                "`teacher: original` is the model as it was before, but that one was handed over in memory and is "
                "being changed",
                where="teacher",
                fix="name the teacher's folder or Hub id, or compress from a folder",
                exit_code=ExitCode.USAGE,
            )
        source = find_source(self._original, revision=self._revision, trust_remote_code=self._trust)
        return source, self._trust
