"""A Hub on loopback, and this process as one of its users."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from llmcompress import compress
from llmcompress.compressed_model import CompressedModel
from tests.hub.server import TOKEN, HubDouble
from tests.tiny_folder import write_tiny_llama

RECIPE = {
    "calibration": {"source": "builtin:calibration", "samples": 4, "tokens": 32},
    "passes": [{"gptq": {"scheme": "int4_g16"}}],
    "evaluate": {"perplexity": [{"source": "builtin:evaluation", "window": 32, "max_windows": 4}]},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """The Hub; constants that huggingface_hub reads from the environment when it is imported are set in their place."""
    constants = huggingface_hub.constants
    with HubDouble().running() as double:
        monkeypatch.setattr(constants, "ENDPOINT", double.url)
        template = double.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, huggingface_hub.file_download):  # 0.36 copied it there
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield double


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model."""
    return write_tiny_llama(tmp_path_factory.mktemp("dense") / "tiny-llama")


@pytest.fixture(scope="session")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> CompressedModel:
    """A compressed model in a folder, and its GGUF export beside it."""
    return compress(str(tiny), RECIPE, tmp_path_factory.mktemp("made") / "out")
