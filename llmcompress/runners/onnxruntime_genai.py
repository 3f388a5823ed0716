"""onnxruntime-genai in this process: its own cache and generation loop, as its users run a folder. B = sequences, T =
tokens, V = vocabulary.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy
import torch
from torch import Tensor
from transformers import AutoConfig
from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.onnx_work import work_of
from llmcompress.runners.work import Work
from llmcompress.storage.paths import from_home

CONFIG = "genai_config.json"
SEQUENCES = 32
"""Its generators take no more at once."""


@RUNNERS.register("onnxruntime_genai")
class OnnxRuntimeGenaiRunner(Runner):
    """The graph on the CPU, whatever device is asked for, with as many threads as PyTorch has."""

    name = "onnxruntime-genai"

    def __init__(self, library: ModuleType, folder: Path) -> None:
        self._library, self._folder = library, folder
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
        config = library.Config(str(folder))
        options = {"intra_op_num_threads": torch.get_num_threads()}
        self.vocabulary = int(said["vocab_size"])
        # where its loop ends; a list would be added to those of the file, and without any it takes the padding token
        own = {"eos_token_id": self._end, "decoder": {"session_options": options}}
        config.overlay(json.dumps({"model": own}))
        self._model = library.Model(config)
        self._file = folder / str(said["decoder"]["filename"])
        self.device = torch.device("cpu")
        self.max_positions = int(said["context_length"])

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        folder, library = from_home(model), _library()
        if not (folder / CONFIG).is_file():
            raise CompressError(
                "model.unloadable",
                f"there is no {CONFIG}",
                where=str(folder),
                fix="give a folder that `llmcompress export --to onnx_genai` wrote",
            )
        try:
            return cls(library, folder)
        except (RuntimeError, ValueError, KeyError) as problem:
            raise CompressError(
                "model.unloadable",
                f"onnxruntime-genai cannot load it: {str(problem)[:500]}",
                where=str(folder),
                fix="export it again; a newer operator may need a newer `onnxruntime-genai`",
            ) from problem

    @override
    def logits(self, ids_BT: Tensor) -> Tensor:
        found = (self._generator(part_BT, 0).get_output("logits") for part_BT in torch.split(ids_BT, SEQUENCES))
        return torch.cat([torch.from_numpy(numpy.array(each)) for each in found]).reshape(*ids_BT.shape, -1)

    @override
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        """By its own greedy search, whose loop keeps the logits inside."""
        parts = [self._stream(part_BT, max_new_tokens) for part_BT in torch.split(ids_BT, SEQUENCES)]
        for new in zip(*parts, strict=True):
            yield torch.cat(new)

    def _stream(self, ids_BT: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        """Of as many sequences as it takes at once.

        It never continues a sequence after the one token that ends texts: then it begins again with all tokens so far.
        """
        generator, ids_BT = self._generator(ids_BT, max_new_tokens), ids_BT.cpu()
        for left in range(max_new_tokens, 0, -1):
            generator.generate_next_token()
            new_B = torch.from_numpy(numpy.array(generator.get_next_tokens())).long()
            yield new_B
            ids_BT = torch.cat([ids_BT, new_B[:, None]], 1)
            if left > 1 and bool((new_B == self._end).any()):
                generator = self._generator(ids_BT, left - 1)

    @property
    def _end(self) -> int:
        """The token at which its loop ends: one of the vocabulary, and the rarest that is known without a tokenizer."""
        return self.vocabulary - 1

    @override
    def work(self, ids_BT: Tensor) -> Work | None:
        """From the graph; None where the package `onnx` is not installed."""
        return work_of(self._file, AutoConfig.from_pretrained(self._folder), *ids_BT.shape)

    @override
    def close(self) -> None:
        del self._model

    def _generator(self, ids_BT: Tensor, new_tokens: int) -> Any:
        """With these tokens in its cache, and room for others."""
        sequences, tokens = ids_BT.shape
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(batch_size=sequences, max_length=tokens + new_tokens, do_sample=False)
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(ids_BT.cpu().numpy().astype(numpy.int32))
        return generator


def _library() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime_genai")
    except ImportError as problem:
        raise CompressError(
            "runner.package",
            "these folders are run by the package `onnxruntime-genai`, which is not installed",
            fix='pip install "llmcompress[genai]"',
        ) from problem
