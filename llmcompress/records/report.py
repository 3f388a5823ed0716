"""The report of a run: what was done to every site, measurements before and after, the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from llmcompress.errors import CompressError
from llmcompress.records.evaluation import Compression, Measured
from llmcompress.records.measurements import StageSeconds, WeightBytes, Which
from llmcompress.records.rows import SiteReport
from llmcompress.storage.json_file import read_json

REPORT = "llmcompress_report.json"
"""Its file, saved with the weights."""

RECIPE = "llmcompress_recipe.yaml"
"""Saved beside the weights and the report: the resolved recipe that makes the same result again."""

VERSION: Literal[1] = 1
"""Increases when a field or a kind of measurement changes its meaning; new kinds do not change it."""


class Report(Measured):
    """Saved as `llmcompress_report.json` with the weights."""

    version: Literal[1] = VERSION
    model: str
    base: dict[str, str] = Field(default_factory=dict)
    """Of the dense model: its `commit` on the Hub, hashes of its `weights` and `config`, as far as they are known."""
    recipe_hash: str
    versions: dict[str, str]
    machine: dict[str, str]
    calibration_tokens: int
    sites: tuple[SiteReport, ...]
    refused: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def degraded(self) -> tuple[SiteReport, ...]:
        """Sites where a fallback was used."""
        return tuple(row for row in self.sites if row.degraded)

    @property
    def bytes_dense(self) -> int:
        """Bytes of the weight files that were read; 0 if not measured."""
        return self._weight_bytes("dense")

    @property
    def bytes_compressed(self) -> int:
        """Bytes of the weight files that were written; 0 if not measured."""
        return self._weight_bytes("compressed")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds by stage."""
        return {each.stage: each.seconds for each in self.of_kind(StageSeconds)}

    def compression(self, recipe: str | None) -> Compression:
        """What it says of how the model was made; `recipe`: as YAML."""
        return Compression(
            model=self.model,
            recipe=recipe,
            calibration_tokens=self.calibration_tokens,
            sites=self.sites,
            refused=self.refused,
            warnings=self.warnings,
        )

    def _weight_bytes(self, of: Which) -> int:
        return next((each.bytes for each in self.of_kind(WeightBytes) if each.of == of), 0)


def read_report(path: Path) -> Report:
    """The report in a file, or in a folder under its usual name.

    Raises: CompressError when there is none, it is damaged, or another version of llmcompress wrote it in another form.
    """
    file = path / REPORT if path.is_dir() else path
    fix = "give a folder that llmcompress wrote, or its report"
    data = read_json(file, code="report.unreadable", fix=fix)
    version = data.get("version", 0)
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        fix = "use a newer llmcompress" if newer else "compress the model again with this version"
        what = f"the report has version {version}, but this version of llmcompress reads version {VERSION}"
        raise CompressError("report.version", what, where=str(file), fix=fix)
    try:
        return Report.model_validate(data)
    except ValidationError as problem:
        what = f"the report is damaged: {problem.errors()[0]['msg']}"
        raise CompressError("report.unreadable", what, where=str(file), fix="compress the model again") from problem
