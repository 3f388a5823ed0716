"""The headline: presets on a real model, each with its bytes, quality, tasks and cost, from the commands users run.

    python evals/headline.py --model FOLDER --calibration wikitext-2/valid.txt --text WikiText-2=wikitext-2/test.txt \\
        --text books=books/test.txt --task-data FOLDER --folders SCRATCH

Every preset is compressed into a folder below `--folders` (kept: a second run goes on), evaluated beside the dense
model, and timed in turns with it; where a target is named, the folder is also exported and its runtime is evaluated
and timed. Calibration text is none of the measured texts. Zero-shot tasks, `--limit` documents of each. Written to
evals/results/headline-NAME.json after every row. `--trained`: instead, the quantization-aware models that `qat.py
--folders` saved there, to trained-NAME.json: beside the rows above, the table of post-training and quantization-aware
results that surveys give for vision models. `--small`: both for the bundled model, with the tasks and windows that a
model of its size and context can be asked.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import llmcompress
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.settings.base import MetricSettings
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.settings.tasks import TaskSettings
from llmcompress.presets import load_preset
from llmcompress.records.evaluation import Evaluation
from llmcompress.records.tasks import TaskComparison, TaskResult

EVALS = Path(__file__).resolve().parent
PROMPT, NEW, TURNS = 128, 48, 5


@dataclass(frozen=True)
class Row:
    """A preset, and the target whose runtime runs it beside torch."""

    preset: str
    """Or the name of a folder that is there."""
    target: str | None = None
    runner: str = "torch"
    quality_by: str | None = None
    """The runner that texts and tasks are measured by, if another."""


@dataclass(frozen=True)
class Setup:
    """What is measured of a model, and how."""

    name: str
    tasks: tuple[str, ...]
    window: int
    windows: int
    samples: int
    """Of calibration, and the tokens of each."""
    tokens: int
    presets: tuple[Row, ...]
    trained: tuple[Row, ...]


REAL = Setup(
    "SmolLM2-135M-Instruct",
    ("local_arc_easy", "local_piqa", "local_openbookqa", "local_winogrande"),
    window=512,
    windows=10,
    samples=16,
    tokens=512,
    presets=(Row("w8"), Row("w4"), Row("w4", "gguf", "llama_cpp"), Row("w3"), Row("w2")),
    trained=(
        Row("int8_g64-gptq-qat", "gguf", "llama_cpp", quality_by="torch"),
        Row("int4_g64-gptq-qat", "gguf", "llama_cpp", quality_by="torch"),
        Row("int3_g64-efficient_qat-qat"),
    ),
)
SMALL = Setup(
    "books-llama",
    ("local_blimp",),
    window=256,
    windows=40,
    samples=128,
    tokens=128,
    presets=(Row("w8"), Row("w4"), Row("w4", "onnx_genai", "onnxruntime_genai"), Row("w3")),
    trained=(
        Row("int8_g32-gptq-qat", "onnx_genai", "onnxruntime_genai", quality_by="torch"),
        Row("int4_g32-gptq-qat", "onnx_genai", "onnxruntime_genai", quality_by="torch"),
        Row("int3_g32-efficient_qat-qat", "onnx_genai", "onnxruntime_genai", quality_by="torch"),
    ),
)


@click.command()
@click.option("--model", required=True, help="Folder of the dense model.")
@click.option("--calibration", required=True)
@click.option("--text", "texts", multiple=True, required=True, metavar="NAME=FILE")
@click.option("--task-data", required=True)
@click.option("--folders", required=True, type=click.Path(path_type=Path))
@click.option("--limit", default=200, show_default=True, help="Documents of each task.")
@click.option("--name", help="Of the result; default: the model's.")
@click.option("--small", is_flag=True, help="The bundled model.")
@click.option("--trained", is_flag=True, help="The models of qat.py.")
@click.option("--quality-only", is_flag=True, help="Leave speed and memory to a later run, on a machine that is idle.")
def main(
    model: str,
    calibration: str,
    texts: tuple[str, ...],
    task_data: str,
    folders: Path,
    limit: int,
    name: str | None,
    small: bool,
    trained: bool,
    quality_only: bool,
) -> None:
    """Measure every row that is not in the result file yet, and the cost of rows that have none."""
    torch.set_num_threads(1)
    setup = SMALL if small else REAL
    name = name or setup.name
    path = EVALS / "results" / f"{'trained' if trained else 'headline'}-{name}.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    facts |= {
        "model": name,
        "calibration": {"source": Path(calibration).name, "samples": setup.samples, "tokens": setup.tokens},
        "window": setup.window,
        "bos": True,
        "texts": [text.partition("=")[0] for text in texts],
        "limit": limit,
        "speed": {"prompt": PROMPT, "new": NEW, "turns": TURNS, "threads": 1},
        "versions": versions(),
        "machine": machine(),
    }
    metrics = _metrics(setup, texts, task_data, limit)
    rows = {(row["preset"], row["runner"]): row for row in facts["rows"]}
    for row in setup.trained if trained else setup.presets:
        found = rows.get((row.preset, row.runner))
        if found is None and trained and not (folders / row.preset).exists():
            click.echo(f"{row.preset} is missing: run qat.py with --folders {folders}", err=True)
            continue
        if found is None:
            found = _measured(row, setup, model, calibration, metrics, folders)
            facts["rows"].append(found)
        if "cost" not in found and not quality_only:
            found["cost"] = _cost(row, model, folders)
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(json.dumps(found)[:400], file=sys.stderr)


def _metrics(setup: Setup, texts: tuple[str, ...], task_data: str, limit: int) -> list[MetricSettings]:
    files = [text.partition("=")[2] for text in texts]
    perplexities = [
        PerplexityTask(source=file, window=setup.window, bos="always", max_windows=setup.windows) for file in files
    ]
    return [*perplexities, *(TaskSettings(task=task, data=task_data, limit=limit) for task in setup.tasks)]


def _measured(
    row: Row, setup: Setup, model: str, calibration: str, metrics: list[MetricSettings], folders: Path
) -> dict[str, Any]:
    folder, cpu = folders / row.preset, None
    if not folder.exists():
        settings = [
            f"calibration.source={calibration}",
            f"calibration.samples={setup.samples}",
            f"calibration.tokens={setup.tokens}",
            "evaluate={}",
        ]
        began = time.process_time()
        llmcompress.compress(model, load_preset(row.preset, settings=settings), folder)
        cpu = round(time.process_time() - began, 1)
    place = _place(row, folders)
    if row.target and not place.exists():
        llmcompress.export(folder, row.target, place, run=False)
    judged = folder if row.quality_by == "torch" else place
    found = llmcompress.evaluate(judged, metrics, baseline=model, runner=row.quality_by or row.runner)
    return {
        "preset": row.preset,
        "runner": row.runner,
        "target": row.target,
        "compress_cpu_seconds": cpu,
        "quality": _quality(found),
        "tasks": _tasks(found),
    }


def _place(row: Row, folders: Path) -> Path:
    return folders / (f"{row.preset}-{row.target}" if row.target else row.preset)


def _cost(row: Row, model: str, folders: Path) -> list[dict[str, Any]]:
    """Of the dense model and the row, in turns."""
    place = _place(row, folders)
    table = llmcompress.speed(
        [model, str(place)],
        runner=["torch", row.runner],
        context=PROMPT,
        new_tokens=NEW,
        repeats=TURNS,
        threads=1,
    )
    return [
        {**each.model_dump(mode="json"), "model": "dense" if each.model == model else row.preset} for each in table.rows
    ]


def _quality(found: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "dense": each.dense.perplexity,
            "compressed": each.compressed.perplexity,
            "ratio_error": each.ratio_error,
            "tokens": each.dense.tokens,
            "divergence": None if each.divergence is None else each.divergence.model_dump(mode="json"),
        }
        for each in found.quality
    ]


def _tasks(found: Evaluation) -> dict[str, Any]:
    return {
        "results": [each.model_dump(mode="json") for each in found.of_kind(TaskResult)],
        "comparisons": [each.model_dump(mode="json") for each in found.of_kind(TaskComparison)],
    }


if __name__ == "__main__":
    main()
