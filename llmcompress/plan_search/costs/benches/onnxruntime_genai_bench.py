"""onnxruntime-genai: products are those of ONNX Runtime, blocks have attention and a cache of its own."""

from __future__ import annotations

import importlib.metadata
from typing import ClassVar

from typing_extensions import override

from llmcompress.plan_search.costs.bench import BENCHES
from llmcompress.plan_search.costs.benches.onnxruntime_bench import OnnxRuntimeBench


@BENCHES.register("onnxruntime_genai")
class OnnxRuntimeGenaiBench(OnnxRuntimeBench):
    """The same operators for matrices; a prefill computes the logits of all its tokens too."""

    target: ClassVar[str] = "onnx_genai"

    @override
    def versions(self) -> dict[str, str]:
        packages = ("onnxruntime", "onnxruntime-genai")
        return {name: importlib.metadata.version(name) for name in packages}
