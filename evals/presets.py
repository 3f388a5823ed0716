"""Every preset on a real model: perplexity on two texts, bytes, seconds and memory against what the dry run estimated.

    python evals/presets.py --model FOLDER --calibration valid.txt --text wikitext2=test.txt --name NAME --out FOLDER

Each preset runs as shipped, in a process of its own, with these changes: the calibration text, at most SAMPLES ×
TOKENS of it, and with `--training-steps` no more steps of training than that (eight times as many of a block), so
that presets which train for hours are run too: what they recover is another question (`qat.py`, `healing.py`). One
that does not end within `--limit` seconds is recorded as not done. Estimated and measured are of the same process:
the plan comes first, on the speed of matrix products measured then. Writes evals/results/presets-NAME.json after
every preset, and goes on where it was stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from study import resident_bytes

from llmcompress.elicitation.steps.read import Read
from llmcompress.evaluation.environment import machine, versions
from llmcompress.passes.base import PASSES
from llmcompress.presets import load_preset, preset_names

WINDOW, WINDOWS = 512, 10
"""About 5,100 tokens of each text."""


@click.command()
@click.option("--model", required=True)
@click.option("--calibration", required=True)
@click.option("--text", "texts", multiple=True, required=True, help="NAME=FILE")
@click.option("--name", required=True, help="of the result file")
@click.option("--samples", default=16, show_default=True)
@click.option("--tokens", default=512, show_default=True)
@click.option("--training-steps", type=int, help="at most so many; default: as shipped")
@click.option("--limit", default=420, show_default=True, help="seconds for one preset")
@click.option("--only", "chosen", multiple=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="an empty folder for results")
@click.option("--one", hidden=True)
def main(
    model: str,
    calibration: str,
    texts: tuple[str, ...],
    name: str,
    samples: int,
    tokens: int,
    training_steps: int | None,
    limit: int,
    chosen: tuple[str, ...],
    out: Path,
    one: str | None,
) -> None:
    """Run every preset that is not in the result file yet."""
    if one is not None:
        steps = shortened(one, training_steps) if training_steps else {}
        print(json.dumps(run_one(one, model, calibration, texts, samples, tokens, steps, out / one)))
        return
    path = Path(__file__).parent / "results" / f"presets-{name}.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    facts |= {
        "model": name,
        "calibration": Path(calibration).name,
        "samples": samples,
        "tokens": tokens,
        "limit": limit,
        "window": WINDOW,
        "texts": [text.partition("=")[0] for text in texts],
        "versions": versions(),
        "machine": machine(),
    }
    done = {row["preset"] for row in facts["rows"]}
    presets = chosen or tuple(each for each in preset_names() if "/" not in each)
    for preset in [each for each in presets if each not in done]:
        facts["rows"].append(in_its_own_process(preset, limit))
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        click.echo(json.dumps(facts["rows"][-1]), err=True)


def in_its_own_process(preset: str, limit: int) -> dict[str, Any]:
    """The row of a preset, or why there is none."""
    command = [sys.executable, *sys.argv, "--one", preset]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"preset": preset, "not_done": f"not done after {limit} s"}
    if found.returncode:
        return {"preset": preset, "not_done": found.stderr.strip().splitlines()[-1][:300]}
    row: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return row


def shortened(preset: str, most: int) -> dict[str, int]:
    """Settings of trainings that take more steps → at most so many; eight times as many where a block is trained."""
    found: dict[str, int] = {}
    for each in load_preset(preset).passes:
        name, training = PASSES.name_of(type(each)), getattr(each, "training", None)
        if training is not None and training.steps > most:
            found[f"passes.{name}.training.steps"] = most
        if training is None and getattr(each, "steps", 0) > 8 * most:
            found[f"passes.{name}.steps"] = 8 * most
    return found


def run_one(
    preset: str,
    model: str,
    calibration: str,
    texts: tuple[str, ...],
    samples: int,
    tokens: int,
    steps: dict[str, int],
    out: Path,
) -> dict[str, Any]:
    """Plan, then compress with measurements; both are told apart by their own clocks."""
    import torch

    from llmcompress.cost import this_machine
    from llmcompress.pipeline import compress, plan

    torch.set_num_threads(1)
    loaded = load_preset(preset)
    shipped = loaded.calibration
    tasks = [
        {"source": text.partition("=")[2], "window": WINDOW, "bos": "always", "max_windows": WINDOWS} for text in texts
    ]
    settings = [
        f"calibration.source={calibration}",
        f"calibration.samples={min(samples, shipped.samples)}",
        f"calibration.tokens={min(tokens, shipped.tokens)}",
        f"evaluate.perplexity={json.dumps(tasks)}",
        *(f"{name}={count}" for name, count in steps.items()),
        *(
            f"data.{number}.read.source={calibration}"
            for number, step in enumerate(loaded.data)
            if isinstance(step, Read)
        ),
    ]
    recipe = load_preset(preset, settings=settings)
    foreseen = plan(model, recipe, machine=this_machine(torch.device("cpu")))
    cpu, started = time.process_time(), time.perf_counter()
    report = compress(model, recipe, out, overwrite=True).report
    quality = {
        text.partition("=")[0]: {
            "dense": each.dense.perplexity,
            "compressed": each.compressed.perplexity,
            "ratio_error": each.ratio_error,
            "tokens": each.dense.tokens,
        }
        for text, each in zip(texts, report.quality, strict=True)
    }
    return {
        "preset": preset,
        "samples": min(samples, shipped.samples),
        "tokens": min(tokens, shipped.tokens),
        "shortened": steps,
        "quality": quality,
        "bytes_dense": report.bytes_dense,
        "bytes": report.bytes_compressed,
        "bytes_estimated": foreseen.output_bytes,
        "stages": report.seconds,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "compress_estimated": foreseen.estimated_seconds,
        "evaluate_estimated": foreseen.evaluation_seconds,
        "peak_bytes": resident_bytes("VmHWM"),
        "peak_estimated": foreseen.peak_memory_bytes,
        "degraded": len(report.degraded),
        "warnings": list(report.warnings),
    }


if __name__ == "__main__":
    main()
