"""llama.cpp in this process, through the wheels of `cyllama`: it runs GGUF files as their users do. T = tokens, V =
vocabulary.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.loading.gguf_files import gguf_file
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.gguf_work import GgufHeader, gguf_header
from llmcompress.runners.work import Work

_BATCH = 512
"""Tokens that go through the model together: llama.cpp keeps all their logits."""
_LEAST_CONTEXT = 512
_ERROR = 4
"""Among the levels of ggml's log."""


@RUNNERS.register("llama_cpp")
class LlamaCppRunner(Runner):
    """A GGUF file on the CPU, whatever device is asked for, with as many threads as PyTorch has.

    Activations are rounded to 8 bits and keys and values stored in float16, as llama.cpp does by default.
    """

    name = "llama.cpp"

    def __init__(self, library: ModuleType, path: str) -> None:
        self._library, self._path = library, Path(path)
        settings = library.LlamaModelParams()
        settings.n_gpu_layers = 0
        self._model = _model_class(library)(path, settings)
        self._context: Any = None
        self._room = (0, 0)
        self.device = torch.device("cpu")
        self.vocabulary = int(self._model.get_vocab().n_vocab)
        self.max_positions = int(self._model.n_ctx_train)

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        path, library = gguf_file(model), _library()
        said: list[str] = []
        library.set_log_callback(partial(_note_error, said))
        try:
            return cls(library, str(path))
        except (ValueError, RuntimeError, OSError) as problem:
            raise CompressError(
                "model.unloadable",
                f"llama.cpp cannot load it: {said[0] if said else problem}",
                where=str(path),
                fix="get the file again; a newer architecture may need a newer `cyllama`",
            ) from problem
        finally:
            library.disable_logging()

    @override
    def logits(self, ids_BT: Tensor) -> Tensor:
        return torch.stack([self._scored(ids) for ids in ids_BT.tolist()])

    @override
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        for tokens_B in self._greedy(ids_BT.tolist(), max_new_tokens):
            yield torch.tensor(tokens_B)

    @override
    def work(self, ids_BT: Tensor) -> Work | None:
        batch, tokens = ids_BT.shape
        return None if self._header is None else self._header.work(batch, tokens)

    @cached_property
    def _header(self) -> GgufHeader | None:
        return gguf_header(self._path)

    def tokenize(self, text: str) -> list[int]:
        """The text as llama.cpp reads it, with the tokens that the file says are added; special tokens are read too."""
        return [int(token) for token in self._model.get_vocab().tokenize(text, True, True)]

    @override
    def close(self) -> None:
        if self._context is not None:
            self._context.close()
        self._model.close()

    def _scored(self, ids: Sequence[int]) -> Tensor:
        """T×V of one sequence."""
        context = self._emptied(len(ids))
        scores_TV = torch.empty(len(ids), self.vocabulary)
        for start in range(0, len(ids), _BATCH):
            piece = ids[start : start + _BATCH]
            self._decode([(token, start + place, 0, True) for place, token in enumerate(piece)])
            for place in range(len(piece)):
                row = array("f", context.get_logits_ith(place))
                scores_TV[start + place] = torch.frombuffer(row, dtype=torch.float32)
        return scores_TV

    def _greedy(self, prompts: Sequence[Sequence[int]], count: int) -> Iterator[list[int]]:
        """Of equally long sequences the next tokens, step by step."""
        length = len(prompts[0])
        context = self._emptied(length + count, len(prompts))
        sampler = self._library.LlamaSampler(self._library.LlamaSamplerChainParams())
        sampler.add_greedy()
        tokens_B: list[int] = []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, length, _BATCH):
                piece = prompt[start : start + _BATCH]
                last = length - 1
                self._decode([(token, place, sequence, place == last) for place, token in enumerate(piece, start)])
            tokens_B.append(int(sampler.sample(context, -1)))
        for place in range(length, length + count):
            yield tokens_B
            if place + 1 < length + count:
                self._decode([(token, place, sequence, True) for sequence, token in enumerate(tokens_B)])
                tokens_B = [int(sampler.sample(context, index)) for index in range(len(prompts))]

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Tokens with their positions and sequences, and whether their logits are wanted."""
        batch = self._library.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for token, place, sequence, wanted in tokens:
            batch.add(token, place, [sequence], wanted)
        self._context.decode(batch)
        batch.close()

    def _emptied(self, tokens: int, sequences: int = 1) -> Any:
        """A context with room for sequences of that many tokens, and nothing in it."""
        if self._context is None or self._room[0] < tokens or self._room[1] != sequences:
            if self._context is not None:
                self._context.close()
            settings = self._library.LlamaContextParams()
            self._room = (max(_LEAST_CONTEXT, tokens), sequences)
            settings.n_ctx, settings.n_seq_max = self._room[0] * sequences, sequences
            settings.n_batch = settings.n_ubatch = _BATCH
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
            settings.no_perf = True
            self._context = self._library.LlamaContext(self._model, settings)
        self._context.kv_cache_clear()
        return self._context


def _library() -> ModuleType:
    try:
        library = importlib.import_module("cyllama.llama.llama_cpp")
    except ImportError as problem:
        raise CompressError(
            "runner.package",
            "llama.cpp is run through the package `cyllama`, which is not installed",
            fix="pip install llmcompress[llamacpp]",
        ) from problem
    return library


def _model_class(library: ModuleType) -> type[Any]:
    """With `n_vocab`, which `get_logits_ith` of cyllama 0.2.18 asks of the model and its class does not have."""
    return type("Model", (library.LlamaModel,), {"n_vocab": property(lambda model: model.get_vocab().n_vocab)})


def _note_error(said: list[str], level: int, text: str) -> None:
    """What llama.cpp logs while it loads, of which only errors are kept; the first one names the cause."""
    if level == _ERROR:
        said.append(text.strip().rpartition("error loading model: ")[2])
