"""GPTQ folders in transformers, whose linears are then the kernels of GPTQModel."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Self

import torch
from transformers import AutoModelForCausalLM
from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.storage.paths import from_home


@RUNNERS.register("gptqmodel")
class GptqModelRunner(TorchRunner):
    """As their users load them. Its kernels compute in 16 bits, on CPUs too: `dtype` float32 is taken as bfloat16."""

    name = "GPTQModel"

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        if find_spec("gptqmodel") is None:
            raise CompressError(
                "runner.package",
                "GPTQ folders are run by vLLM or by transformers with the package `gptqmodel`, which is not installed",
                fix="pip install gptqmodel",
            )
        half = torch.bfloat16 if dtype == torch.float32 else dtype
        try:
            loaded = AutoModelForCausalLM.from_pretrained(from_home(model), dtype=half, device_map={"": device})
        except (OSError, ImportError, RuntimeError, ValueError) as problem:
            raise CompressError(
                "model.unloadable",
                f"GPTQModel cannot load it: {str(problem)[:500]}",
                where=model,
                fix="export it again",
            ) from problem
        return cls(loaded, device=device)
