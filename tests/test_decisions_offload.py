"""Weights on disk stay there while a pass decides: one block at a time is in memory in float32."""

from pathlib import Path

import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.offloading import OnDisk
from llmcompress.calibration.whole import WholeModel
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.base import PASSES
from llmcompress.progress import Silent
from tests.tiny_folder import write_tiny_llama


class Counting(Silent):
    """Notes how many bytes of the model's parameters are float32, whenever something is computed."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.seen: list[int] = []

    def substep(self, text: str) -> None:
        self.seen.append(float32_bytes(self.model))


def float32_bytes(module: torch.nn.Module) -> int:
    found = (each for each in module.parameters() if each.dtype == torch.float32 and each.device.type != "meta")
    return sum(each.numel() * each.element_size() for each in found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixed_precision", {"sensitivity": "output", "schemes": ["int4_g16", "int8_channel"], "bits": 6.0}),
        ("wanda", {"allocation": "outliers"}),
    ],
)
def test_deciding_holds_one_block(name: str, options: dict[str, object], tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny", hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    loaded = load_for_compression(find_source(str(folder)), scratch=tmp_path / "scratch")
    assert loaded.weights is not None
    counting = Counting(loaded.model)
    context = RunContext(
        torch.arange(4 * 32).reshape(4, 32) % 200, batch=2, weights_at=OnDisk(loaded.weights), progress=counting
    )
    whole = WholeModel(loaded.model, map_model(loaded.model), context)
    resident = float32_bytes(loaded.model)
    assert PASSES[name].model_validate(options).decide(whole)
    block = sum(each.numel() * 4 for each in loaded.model.get_submodule(whole.map.blocks[0].name).parameters())
    assert counting.seen or name == "wanda"
    assert all(bytes_ <= resident + block for bytes_ in counting.seen)
    assert float32_bytes(loaded.model) == resident
    assert resident + block < sum(each.numel() * 4 for each in loaded.model.parameters()) / 2
