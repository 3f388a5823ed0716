"""Suites of metrics that come with the package: `configs/suites`, each an `evaluate:` as in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict

from llmcompress.errors import CompressError, ExitCode, did_you_mean
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, MetricSettings
from llmcompress.presets import configs_folder
from llmcompress.recipe.document import read_file
from llmcompress.recipe.problems import validated
from llmcompress.recipe.schema import schema_of
from llmcompress.recipe.stages import Grouped


class Suite(BaseModel):
    """One file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluate: Annotated[tuple[MetricSettings, ...], Grouped(METRIC_SETTINGS)]


def suite_names() -> tuple[str, ...]:
    """`full`, `quick`, `standard`."""
    return tuple(path.stem for path in sorted((configs_folder() / "suites").glob("*.yaml")))


def suite_summary(name: str) -> str:
    """The first comment line of a suite."""
    return _file(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def load_suite(name: str) -> tuple[MetricSettings, ...]:
    """The settings of all metrics of a suite; `name` may also be a YAML file.

    Raises: CompressError naming the nearest suite, or what is wrong in the file.
    """
    return validated(read_file(_file(name)), Suite, lambda: schema_of(Suite)).evaluate


def _file(name: str) -> Path:
    if name.endswith((".yaml", ".yml", ".json")):
        return Path(name)
    if name not in suite_names():
        fix = did_you_mean(name, suite_names())
        raise CompressError("suite.unknown", f"unknown suite {name!r}", fix=fix, exit_code=ExitCode.USAGE)
    return configs_folder() / "suites" / f"{name}.yaml"
