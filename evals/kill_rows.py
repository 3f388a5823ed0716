"""What became of commands that were killed, and how a part of them is measured again without losing the others."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.evaluation.environment import machine, versions


@dataclass
class Row:
    """One command that was killed."""

    command: str
    kills: list[float] = field(default_factory=list)
    """CPU seconds that it had taken; of pushes, and of runs under version 0.1.0, seconds of a clock after its start."""
    moments: list[str] = field(default_factory=list)
    """Of a push: the requests of the Hub at which it was killed."""
    seconds_in_peace: float = 0.0
    seconds_of_last: float = 0.0
    same: bool = False
    partial: list[str] = field(default_factory=list)
    """What a reader saw that was not complete."""
    differing: list[str] = field(default_factory=list)


def write_rows(file: Path, found: Sequence[Row], *, measured: Collection[str], typed: str) -> dict[str, Any]:
    """Write rows in the place of earlier ones of the commands that were `measured`; the others stay."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": [], "runs": []}
    rows = [row for row in before["rows"] if row["command"] not in measured] + [asdict(row) for row in found]
    run = {"command": typed, "versions": versions(), "machine": machine()}
    facts = {
        "commands": len(rows),
        "kills": sum(len(row["kills"]) for row in rows),
        "same": sum(row["same"] for row in rows),
        "partial_folders_seen": sum(len(row["partial"]) for row in rows),
        "runs": [*(each for each in before["runs"] if each["command"] != typed), run],
        "rows": rows,
    }
    file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts
