"""Runs the steps one after the other; every finished unit is one line of a file, from which a killed chain resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmcompress.elicitation.authors import Authors
from llmcompress.elicitation.base import STEPS, DataStep, Row, Tools
from llmcompress.errors import CompressError
from llmcompress.progress import Progress
from llmcompress.storage.disk import disk_errors
from llmcompress.storage.json_lines import append_line, read_json_lines


def make_rows(
    steps: Sequence[DataStep], authors: Authors, *, seed: int, folder: Path | None, progress: Progress
) -> list[Row]:
    """The rows that the last step leaves; `folder` holds one file per step, None: nothing is saved.

    Raises: CompressError when no row is left, a step misses something, or the disk is full.
    """
    rows: list[Row] = []
    for index, step in enumerate(steps):
        name = STEPS.name_of(type(step))
        path = None if folder is None else folder / f"{index:02d}-{name}.jsonl"
        seeds = (seed * 1_000_003 + index) * 1_000_003
        before = len(rows)
        rows = step.finished(_made(step, rows, Tools(authors, seeds), path=path, progress=progress))
        progress.note(f"data, {name}: {before} → {len(rows)} rows")
        if not rows:
            raise CompressError(
                "data.empty",
                f"no row is left after the step `{name}`",
                where=f"data.{index}.{name}",
                fix="loosen its limits, or make more rows before it",
            )
    return rows


def _made(step: DataStep, given: Sequence[Row], tools: Tools, *, path: Path | None, progress: Progress) -> list[Row]:
    """All rows of a step; unit number k gets the seed of `tools` plus k."""
    name = STEPS.name_of(type(step))
    units: list[list[Row]] = read_json_lines(path) if path else []
    made = [row for unit in units for row in unit]
    count = step.units(given)
    for number in range(len(units), count):
        progress.substep(f"data, {name}: {len(made)} rows", done=number, total=count)
        rows = step.unit(number, given, made, replace(tools, seed=tools.seed + number))
        if path:
            _append(path, rows, units=number)
        made += rows
    return made


def _append(path: Path, rows: Sequence[Row], *, units: int) -> None:
    with disk_errors(path, saved=f"{units} units in {path}: run the same command again to resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, json.dumps(list(rows), ensure_ascii=False))
