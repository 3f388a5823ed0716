"""Graphs of fixed sizes through Optimum, which needs transformers 4.57: no free dimension, and PyTorch's logits."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from llmcompress import export
from llmcompress.exporters.onnx_file import FILE
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.verification.verifying import verified
from tests.exporters.gguf_models import MODELS, tiny_quantized, tokenizer
from tests.exporters.test_onnx import with_coded_table
from tests.exporters.test_onnx_families import in_process  # noqa: F401  (a fixture)

pytestmark = pytest.mark.transformers4

FAMILIES = ["llama_tied_biased", "qwen3", "phi3", "gpt2"]
TOKENS = 24


def test_no_size_is_free_and_logits_are_pytorchs(in_process, monkeypatch, tmp_path: Path) -> None:  # noqa: F811
    monkeypatch.setitem(MODELS, "gpt2", {"model_type": "gpt2"})
    for family in FAMILIES:
        model, folder = tiny_quantized(family, ["int8_channel_a8tensor"]), tmp_path / family
        model = with_coded_table(model) if family == "qwen3" else model
        options = {"onnx_static_int8": {"sequence": TOKENS}}
        report = export(model, "onnx_static_int8", folder, tokenizer=tokenizer(), options=options)["onnx_static_int8"]
        assert not report.differing and report.runtime is not None
        assert not verified(folder, name="out").failed
        onnx.checker.check_model(str(folder / FILE), full_check=True)
        found = onnx.shape_inference.infer_shapes(onnx.load(str(folder / FILE)), data_prop=True)
        assert {each.domain for each in found.opset_import} == {""}
        for each in (*found.graph.input, *found.graph.output, *found.graph.value_info):
            dims = each.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") for dim in dims), f"{family}: {each.name}"
        kinds = {node.op_type for node in found.graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds and "Shape" not in kinds, f"{family}: {kinds}"
        ids_BT = torch.randint(3, 280, (2, 20), generator=torch.Generator().manual_seed(0))
        opened = RUNNERS["onnxruntime"].open(str(folder), device=torch.device("cpu"), dtype=torch.float32)
        with opened as runner, TorchRunner(model) as reference:
            torch.testing.assert_close(runner.logits(ids_BT), reference.logits(ids_BT), rtol=0, atol=0.05)
            assert runner.max_positions == TOKENS
