"""`SearchSettings`: a search file as frozen data: what may be decided, how plans are judged, by which optimizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmcompress.calibration.settings import Calibration, Guard
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, MetricSettings
from llmcompress.evaluation.settings.perplexity import BUNDLED_TEXT
from llmcompress.plan_search.amounts import AXES, read_amount
from llmcompress.plan_search.optimizers.base import OPTIMIZERS, Optimizer
from llmcompress.plan_search.proxies.settings import ProxySettings
from llmcompress.plan_search.proxies.supernet.elastic import ElasticSettings
from llmcompress.plan_search.selection import SELECTIONS, LeastLoss, Selection
from llmcompress.plan_search.space import Space
from llmcompress.presets import configs_folder
from llmcompress.recipe.checking import check_document
from llmcompress.recipe.document import Document, read_document, read_file, write_yaml
from llmcompress.recipe.model import Save
from llmcompress.recipe.stages import Grouped

Axis = Literal["bytes", "memory", "prefill", "decode", "energy"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class JudgeSettings(ProxySettings):
    """How plans are judged: the KL divergence from the dense model on text that no pass measures."""

    text: Calibration | None = None
    """Where the text comes from; None: further windows of the calibration text. Never the text of the final evaluation.
    """
    stages: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(2048, 16384), min_length=1)
    """Tokens: all plans are judged on few, the best of them on more. Rounded to whole windows."""
    supernet: ElasticSettings | None = None
    """Plans are judged by the sub-network that they choose in a supernet, which is trained first (OFA); linears of it
    are dense. None: by their levels."""


class CostSettings(_Settings):
    """What plans cost, beside their loss."""

    axes: tuple[Axis, ...] = ("bytes",)
    """Objectives of the search; axes that `limits` names are added. Bytes are exact, seconds come from a table."""
    runtime: str = "torch"
    """The runtime whose operations are timed."""
    table: str | None = None
    """A latency table measured before, here or on another device (scripts/measure_latency.py); None: measured here when
    seconds are asked for, as the following options say."""
    batch: int = Field(default=1, ge=1)
    """Sequences."""
    context: int = Field(default=128, ge=1)
    """Tokens of the prompt."""
    turns: int = Field(default=5, ge=1)
    """How often everything is measured; medians are taken."""
    threads: int | None = Field(default=None, ge=1)
    """Threads; None: as many as PyTorch has."""


class Limits(_Settings):
    """The most that a plan may cost; `0.25x` is a fraction of what the dense model costs."""

    bytes: str | None = Field(default=None, examples=["60MB"])
    """Of the weight files: `60MB`."""
    memory: str | None = Field(default=None, examples=["4GB"])
    """Peak memory: `4GB`."""
    prefill: str | None = Field(default=None, examples=["1ms/token"])
    """Seconds per token of the prompt: `1ms/token`."""
    decode: str | None = Field(default=None, examples=["50ms/token"])
    """Seconds per generated token: `50ms/token`, `20 tokens/s`."""
    energy: str | None = Field(default=None, examples=["0.4J/token"])
    """Joules per generated token: `0.4J/token`."""

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for axis, text in self.given.items():
            read_amount(text, axis)
        return self

    @property
    def given(self) -> dict[str, str]:
        """Axis → limit, as written."""
        return {axis: text for axis in AXES if (text := getattr(self, axis)) is not None}

    def values(self, dense: dict[str, float]) -> dict[str, float]:
        """Axis → limit in bytes, seconds or joules; `dense` is what the dense model costs."""
        return {axis: read_amount(text, axis).of(dense.get(axis, 0.0)) for axis, text in self.given.items()}


class Finish(_Settings):
    """What is done when the optimizer is done."""

    front: int = Field(default=16, ge=1)
    """So many plans of the front found on few tokens are judged on the most, with all uniform plans that fit."""
    compress: int = Field(default=1, ge=0)
    """So many plans of the front, the selected one first, are compressed for real and evaluated beside uniform plans;
    0: none."""


class SearchSettings(_Settings):
    """Everything that a search depends on."""

    model: str | None = Field(default=None, min_length=1)
    """Hub id, folder or `builtin:books-llama`; None: given beside the file."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, tag or branch of the Hub repository."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Random seed of the optimizer and of the calibration windows."""
    space: Space
    """What may be decided."""
    calibration: Calibration = Calibration()
    guard: Guard = Guard(fall_back=False)
    """As in recipes; recipes of plans keep what was chosen unless `fall_back` is set."""
    save: Save = Save()
    judge: JudgeSettings = JudgeSettings()
    costs: CostSettings = CostSettings()
    optimizer: Annotated[tuple[Optimizer, ...], Grouped(OPTIMIZERS)]
    """One optimizer with its options: `{evopress: {trials: 200}}`."""
    limits: Limits = Limits()
    select: Annotated[tuple[Selection, ...], Grouped(SELECTIONS)] = (LeastLoss(),)
    """The rule that takes one plan of the front: `{lexicographic: {tolerances: [0.05]}}`."""
    finish: Finish = Finish()
    evaluate: Annotated[tuple[MetricSettings, ...], Grouped(METRIC_SETTINGS)] = BUNDLED_TEXT
    """What the models that are compressed at the end are evaluated on; no plan is chosen by it."""

    @model_validator(mode="after")
    def _one_optimizer(self) -> Self:
        if len(self.optimizer) != 1:
            raise ValueError("`optimizer` must name exactly one optimizer, e.g. `optimizer: {evopress: {}}`")
        if len(self.select) != 1:
            raise ValueError("`select` must name exactly one rule, e.g. `select: {least_loss: {}}`")
        return self

    @property
    def axes(self) -> tuple[str, ...]:
        """Costs that plans are judged by: objectives and what is limited."""
        return tuple(axis for axis in AXES if axis in self.costs.axes or axis in self.limits.given)

    def recipe_settings(self) -> dict[str, Any]:
        """Keys of every plan's recipe beside its passes."""
        names = ("model", "revision", "trust_remote_code", "seed", "calibration", "guard", "save", "evaluate")
        return {name: value for name, value in self.model_dump(mode="json").items() if name in names}

    def for_model(self, given: str | None) -> SearchSettings:
        """The same for the model given beside the file; None keeps the file's own.

        Raises: CompressError when there is no model.
        """
        if given is None and self.model is None:
            raise CompressError(
                "search.no-model",
                "no model: none was given, and the search file names none",
                fix="give the model as an argument, or set `model:` in the file",
                exit_code=ExitCode.USAGE,
            )
        return self if given is None else self.model_copy(update={"model": given})

    def to_yaml(self) -> str:
        """Every default written out; read back to equal settings."""
        return write_yaml(self.model_dump(mode="json"))

    @property
    def of_trials(self) -> dict[str, Any]:
        """What decides which plans are tried and what is found of them."""
        return self.model_dump(mode="json", exclude={"select", "finish", "evaluate", "guard"})


def hashed(value: Any) -> str:
    """16 hexadecimal digits of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_search(file: str | Path, *, settings: Sequence[str] = ()) -> SearchSettings:
    """A search file, or one that comes with the package by its name (`joint`); settings such as `seed=1` change it.

    Raises: CompressError with line and fix.
    """
    return check_document(read_file(search_path(file)), SearchSettings, settings=settings)


def parse_search(text: str, where: str = "search") -> SearchSettings:
    """Read a search from YAML or JSON text.

    Raises: CompressError with line and fix.
    """
    return check_document(read_document(text, where), SearchSettings)


def search_from(data: dict[str, Any]) -> SearchSettings:
    """A search from plain data.

    Raises: CompressError naming the key.
    """
    return check_document(Document("search", data), SearchSettings)


def search_names() -> tuple[str, ...]:
    """Search files that come with the package."""
    return tuple(path.stem for path in sorted((configs_folder() / "search").glob("*.yaml")))


def search_path(file: str | Path) -> Path:
    """The file, or that of a name."""
    return configs_folder() / "search" / f"{file}.yaml" if str(file) in search_names() else Path(file)
