"""PEFT in this process: a model with an adapter in the folder below it, as `PeftModel.from_pretrained` opens it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Self

import torch
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.torch_runner import TorchRunner

_FOLDER = "adapter"


@RUNNERS.register("peft")
class PeftRunner(TorchRunner):
    """What the `peft` target wrote: the model from the folder, its adapter from `adapter/`."""

    name = "PEFT"

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        try:
            peft = importlib.import_module("peft")
        except ImportError as problem:
            raise CompressError(
                "runner.package",
                "PEFT is not installed",
                fix='pip install "llmcompress[peft]"',
                exit_code=ExitCode.USAGE,
            ) from problem
        if not (Path(model) / _FOLDER / "adapter_config.json").is_file():
            raise CompressError(
                "model.unloadable",
                "there is no adapter for PEFT",
                where=str(Path(model) / _FOLDER),
                fix="export the model to `peft` first",
                exit_code=ExitCode.USAGE,
            )
        opened = super().open(model, device=device, dtype=dtype)
        with_adapter = peft.PeftModel.from_pretrained(opened._model, str(Path(model) / _FOLDER))
        return cls(with_adapter.base_model.model, device=device)
