"""llama.cpp: small models as GGUF files, and what they differ by."""

from __future__ import annotations

import importlib.metadata
from typing import ClassVar

import torch
from typing_extensions import override

from llmcompress.plan_search.costs.bench import BENCHES, ExportedBench


@BENCHES.register("llama_cpp")
class LlamaCppBench(ExportedBench):
    """Dense weights are bfloat16, and activations are rounded to 8 bits."""

    target: ClassVar[str] = "gguf"
    storage_dtype: ClassVar[torch.dtype] = torch.bfloat16
    measures_products: ClassVar[bool] = False

    @override
    def versions(self) -> dict[str, str]:
        return {"cyllama": importlib.metadata.version("cyllama")}
