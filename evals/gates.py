"""Whether every pass still recovers what it did: passes × model → the most that perplexity may rise, as data.

    python evals/gates.py
    python evals/gates.py --model FOLDER --name smollm2-135m --calibration wikitext-2/valid.txt --text books/valid.txt

A gate is a file of evals/gates: `passes` as in a recipe, and `at_most`, the largest ratio of compressed to dense
perplexity by name of model: 1.3 times the rise that was measured, or .01 more than it. Few windows, one draw: a gate
tells a broken default from a sound one, not the better of two. Measured on validation text, since defaults are chosen
by it. Exit code 1 where a gate is not kept. Writes evals/results/gates-NAME.json after every gate, with what had no
limit for this model; `--only` renews some of its rows.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from pydantic import BaseModel, ConfigDict

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import CalibrationData, calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import Loaded, load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.document import read_value

EVALS = Path(__file__).resolve().parent


class Gate(BaseModel):
    """One file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: list[Any]
    at_most: dict[str, float]
    """Name of a model → largest ratio of perplexities."""


def gates(names: tuple[str, ...] = ()) -> dict[str, Gate]:
    """All gates, or those with these names, by name."""
    files = sorted((EVALS / "gates").glob("*.yaml"))
    found = {path.stem: Gate.model_validate(read_value(path.read_text(encoding="utf-8"))) for path in files}
    return {name: gate for name, gate in found.items() if not names or name in names}


class Measured(BaseModel):
    """What one gate gave."""

    gate: str
    ratio: float
    at_most: float | None
    degraded: int
    """Rows of the report with a fallback."""
    seconds: float

    @property
    def kept(self) -> bool:
        """Also where no limit is known."""
        return self.at_most is None or self.ratio <= self.at_most


def measure(
    name: str,
    gate: Gate,
    loaded: Loaded,
    model_map: ModelMap,
    data: CalibrationData,
    task: PerplexityTask,
    dense: float,
) -> tuple[float, int, float]:
    """Ratio of perplexities, rows with a fallback, seconds of compressing."""
    passes = parse_recipe("passes: " + json.dumps(gate.passes), name).passes
    began = time.perf_counter()
    context = RunContext(data.windows_NT, batch=8, storage_dtype=loaded.preflight.storage_dtype)
    model, rows = apply_passes(copy.deepcopy(loaded.model), model_map, passes, context)
    seconds = time.perf_counter() - began
    found = perplexity(model, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent()).perplexity
    return found / dense, sum(bool(row.degraded) for row in rows), seconds


def write(path: Path, facts: dict[str, Any], row: Measured) -> None:
    """Put the row into the file, in the place of an older one; rows of gates that are gone, or that were measured on
    other text, leave."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"gates": []}
    before, now = (each.get("dense", {}) for each in (known, facts))
    same = all(known.get(name) == facts[name] for name in ("model", "calibration"))
    same = same and all(before[name] == now[name] for name in ("text", "tokens"))
    same = same and abs(before["perplexity"] / now["perplexity"] - 1) < 1e-5
    rows = {each["gate"]: each for each in known["gates"] if same and each["gate"] in gates()}
    rows[row.gate] = row.model_dump(mode="json")
    told = {**facts, "gates": [rows[name] for name in sorted(rows)]}
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--name", default="books-llama", show_default=True, help="of the model in the gates, and of the result")
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured: validation text")
@click.option("--only", multiple=True, help="name of a gate; several may be given")
@click.option("--samples", default=8, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--windows", default=4, show_default=True, help="of 512 tokens that are measured")
def main(
    model: str, name: str, calibration: str, text: str, only: tuple[str, ...], samples: int, tokens: int, windows: int
) -> None:
    """Run the gates on one model."""
    loaded = load_for_compression(find_source(model), dtype=torch.float32)
    model_map = map_model(loaded.model)
    task = PerplexityTask(source=text, window=512, bos="always", max_windows=windows)
    dense = perplexity(loaded.model, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent())
    settings = Calibration(source=calibration, samples=samples, tokens=tokens)
    data = calibration_windows(settings, loaded.tokenizer, max_positions=512, seed=0, progress=Silent())
    facts = {
        "model": name,
        "calibration": f"{samples} × {tokens} tokens of {Path(calibration).name}",
        "dense": dense.model_dump(mode="json"),
        "versions": versions(),
        "machine": machine(),
    }
    path = EVALS / "results" / f"gates-{name}.json"
    measured: list[Measured] = []
    for each, gate in gates(only).items():
        ratio, degraded, seconds = measure(each, gate, loaded, model_map, data, task, dense.perplexity)
        limit = gate.at_most.get(name)
        measured.append(
            Measured(gate=each, ratio=round(ratio, 4), at_most=limit, degraded=degraded, seconds=round(seconds, 1))
        )
        told = "no limit" if limit is None else f"at most {limit:g}{'' if measured[-1].kept else ': NOT KEPT'}"
        click.echo(f"{each:36} ×{ratio:.3f}  {told}  {seconds:.0f} s", err=True)
        write(path, facts, measured[-1])
    sys.exit(int(not all(row.kept for row in measured)))


if __name__ == "__main__":
    main()
