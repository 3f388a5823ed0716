"""A program that AOTInductor compiled, in this process. B = sequences, T = tokens, V = vocabulary."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from typing_extensions import override

from llmcompress.calibration.tokens import max_positions
from llmcompress.errors import CompressError
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.storage.paths import from_home

PROGRAM, TENSORS, DESCRIPTION = "model.pt2", "model.safetensors", "aot_inductor.json"


@RUNNERS.register("aot_inductor")
class AotInductorRunner(Runner):
    """On the processor that it was compiled for, in float32; one sequence at a time, as it was compiled."""

    name = "AOTInductor"

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        inductor: Any = importlib.import_module("torch._inductor")
        self._run = inductor.aoti_load_package(str(folder / PROGRAM))
        self._tensors = load_file(folder / TENSORS)  # the program uses this memory
        self._run.load_constants(self._tensors, check_full_update=False, user_managed=True)
        self._cache = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["cache"]
        self.device = torch.device("cpu")
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.max_positions = max_positions(config)

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        folder = from_home(model)
        if not (folder / PROGRAM).is_file():
            raise CompressError(
                "model.unloadable",
                f"there is no {PROGRAM}",
                where=str(folder),
                fix="give a folder that `llmcompress export --to aot_inductor` wrote",
            )
        try:
            return cls(folder, AutoConfig.from_pretrained(folder))
        except (RuntimeError, OSError, KeyError) as problem:
            raise CompressError(
                "model.unloadable",
                f"torch {torch.__version__} cannot load it: {str(problem)[:500]}",
                where=str(folder / PROGRAM),
                fix="export it again on this computer: a program fits one version of torch and one kind of processor",
            ) from problem

    @override
    @torch.inference_mode()
    def logits(self, ids_BT: Tensor) -> Tensor:
        return torch.cat([self._run(ids_T[None], self._empty())[0] for ids_T in ids_BT.cpu().long()])

    @override
    @torch.inference_mode()
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        fed, caches = [ids_T[None] for ids_T in ids_BT.cpu().long()], [self._empty() for _ in ids_BT]
        for _ in range(max_new_tokens):
            for place, ids_1T in enumerate(fed):
                logits_1TV, caches[place] = self._run(ids_1T, caches[place])
                fed[place] = logits_1TV[:, -1:].argmax(-1)
            yield torch.cat(fed)[:, 0]

    @override
    def close(self) -> None:
        del self._run, self._tensors

    def _empty(self) -> list[Tensor]:
        """A cache with nothing in it."""
        return [torch.zeros(1, heads, 0, size) for heads, size in self._cache]
