"""The base class of export targets: it says what it can represent before any work, and writes it at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration.offloading import InMemory, WeightStore
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.exporters.shards import ShardSizes
from llmcompress.formats import plain
from llmcompress.formats.named import Kind
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import Scheme
from llmcompress.progress import Progress, Silent
from llmcompress.records.export_report import ReadBack
from llmcompress.registry import Registry
from llmcompress.runners.base import RUNNERS, Runner


@dataclass(frozen=True)
class Exact:
    """Codes, scales and zero points are stored as they are."""

    doubt: str | None = None
    """What loaders are known to compute differently. A recipe that names the target gets it anyway;
    `auto` looks further."""


@dataclass(frozen=True)
class Converted:
    """Stored in another form: dequantized to ordinary weights, or with scales of another precision."""

    why: str
    keeps_codes: bool = False
    """Whether it still is codes and scales in the target's own layout."""


@dataclass(frozen=True)
class Refused:
    """Cannot be stored."""

    why: str
    nearest: Scheme | None = None
    """The scheme most like it that could be."""


Answer = Exact | Converted | Refused


@dataclass(frozen=True)
class Writing:
    """How files are written, for any target."""

    storage_dtype: torch.dtype
    """Of scales and of all that stays dense."""
    max_shard_size: str = "5GB"
    weights_at: WeightStore = field(default_factory=InMemory)
    """Where weights go again, block after block, when they are written."""
    sizes: ShardSizes | None = None
    """What counts the bytes in the place of writing files; None: files are written."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of the model: some targets hold it in the file of the weights."""
    model_name: str = "model"
    """What the user called the source, for targets that name the model in the file."""
    progress: Progress = field(default_factory=Silent)
    """Shows what a tool of the target does, which may take minutes."""


@dataclass(frozen=True)
class Saved:
    """What an exporter wrote."""

    weight_files: tuple[str, ...]
    tensor_bytes: int
    format: str
    """`compressed-tensors`, `plain`, `bitsandbytes` or `llmcompress`."""
    dense_sites: Mapping[str, str] = field(default_factory=dict)
    """Quantized sites that were dequantized, and why."""
    unpacked_bytes: int | None = None
    """Of all tensors once a loader has unpacked them; None: they are in the files as they will be in memory."""


class Exporter(BaseModel, ABC):
    """One target; its fields are its options. Subclasses register under the name that recipes use.

    `answers` and `problem` are called twice, by the same function (`choose`): before any work, for what a recipe will
    produce, and for the finished model. What is refused there is never written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    limits: ClassVar[TargetLimits] = TargetLimits()
    """What it requires of codes; quantizers respect it from the start in a recipe that names this target."""
    runtime: ClassVar[str] = "torch"
    """Name of the runner that opens the folder."""
    cannot_run: ClassVar[str | None] = None
    """Why nothing here opens the folder, for targets without a runner."""
    fix: ClassVar[str]
    """What a user can do about a refusal."""
    language: ClassVar[str] = "python"
    """Of `how_to_run`."""
    how_to_run: ClassVar[str] = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))"""
    """At most five lines, run in the exported folder; stands in its README.md."""
    found_at_root: ClassVar[tuple[str, ...]] = ()
    """Globs of the only files that a repository with other formats needs, at its root; empty: all, in a folder called
    as the target."""

    @abstractmethod
    def check(self, site: CodedLinear, storage_dtype: torch.dtype | None) -> Answer:
        """The answer for one quantized linear; `storage_dtype` None: not known yet."""

    def answers(self, contents: Contents) -> dict[str, Answer]:
        """The same for every quantized linear of a model; here stand rules about several of them."""
        return {site.name: self.check(site, contents.storage_dtype) for site in contents.sites}

    def problem(self, contents: Contents) -> str | None:
        """Why it cannot represent this model as a whole; None if it can."""
        return None

    def notes(self, contents: Contents, answers: Mapping[str, Answer]) -> list[str]:
        """What the user should know about the result, one line each."""
        return []

    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """What the files will hold of a linear, by last name; here: an ordinary weight."""
        return plain.tensors((site.outputs, site.inputs), storage_dtype, bias=site.has_bias)

    def runner(self) -> type[Runner]:
        """The runtime that opens the folder, as its users will."""
        return RUNNERS[self.runtime]

    def read_back(self, model: PreTrainedModel, folder: Path, writing: Writing) -> list[ReadBack]:
        """Decode what `write` wrote and compare it with the model; empty: the target has no way to."""
        return []

    @abstractmethod
    def write(self, model: PreTrainedModel, folder: Path, writing: Writing) -> Saved:
        """Write weights and `config.json` of a model that it does not refuse; the model is not changed."""


EXPORTERS: Registry[Exporter] = Registry("exporter", "llmcompress.exporters")
