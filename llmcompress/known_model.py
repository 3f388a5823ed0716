"""What all plans for one model share, independent of the recipe: its files, its map, its size."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import psutil
import torch
from transformers import PreTrainedModel

from llmcompress.calibration.tokens import max_positions
from llmcompress.exporters.loader import Loader, loader_of
from llmcompress.loading.in_memory import dense_model, facts_in_memory
from llmcompress.loading.preflight import ModelFacts, Preflight, preflight
from llmcompress.loading.source import IN_MEMORY, Source
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import probe
from llmcompress.peak_memory import ModelSize
from llmcompress.progress import Progress
from llmcompress.publishing.license import License, license_of


@dataclass(frozen=True)
class KnownModel:
    """A model that was looked at, without its weights."""

    name: str
    checked: ModelFacts
    map: ModelMap
    loader: Loader
    license: License = field(default_factory=License)
    process_bytes: int = 0
    """By how much the process grew: the tokenizer, the family's code, what mapping imports."""


def known_model(source: Source, *, trust_remote_code: bool = False, progress: Progress | None = None) -> KnownModel:
    """Read config and headers, and map the model by experiment; no weights are read.

    Raises: CompressError when the files are not a model that can be compressed.
    """
    before = _resident_bytes()
    checked = preflight(source, trust_remote_code=trust_remote_code, progress=progress)
    model_map, loader = probe(checked.config, unfuse=True), loader_of(checked.config)
    grown = max(0, _resident_bytes() - before)
    hub_id = source.name.partition("@")[0] if source.revision else None
    return KnownModel(source.name, checked, model_map, loader, license_of(source.folder, hub_id=hub_id), grown)


def known_in_memory(model: PreTrainedModel) -> KnownModel:
    """The same of a dense model in memory, which stays as it is.

    Raises: CompressError when it cannot be compressed.
    """
    found = dense_model(model)
    name = f"{IN_MEMORY}{type(found).__name__}"
    return KnownModel(name, facts_in_memory(found), probe(found.config, unfuse=True), loader_of(found.config))


def size_of(checked: ModelFacts) -> ModelSize:
    """The numbers that memory and time depend on."""
    converts = isinstance(checked, Preflight) and checked.storage_dtype != torch.float32
    return ModelSize(
        parameters=sum(prod(shape) for shape in checked.contents.shapes.values()),
        vocabulary=checked.contents.embedding_rows,
        max_positions=max_positions(checked.config),
        converted_bytes=checked.bytes_weights if converts else 0,
    )


def _resident_bytes() -> int:
    found: int = psutil.Process().memory_info().rss
    return found
