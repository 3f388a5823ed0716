"""OpenVINO: small models as Optimum writes them, and what they differ by."""

from __future__ import annotations

import importlib.metadata
from typing import ClassVar

from typing_extensions import override

from llmcompress.plan_search.costs.bench import BENCHES, ExportedBench


@BENCHES.register("openvino")
class OpenVinoBench(ExportedBench):
    """In float32, which computes exactly."""

    target: ClassVar[str] = "openvino"
    measures_products: ClassVar[bool] = False

    @override
    def versions(self) -> dict[str, str]:
        return {"openvino": importlib.metadata.version("openvino")}
