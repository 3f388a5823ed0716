"""What `plan --probe` estimates for presets, against what the run then takes: bytes, peak memory, time.

    python evals/plan.py --model FOLDER --calibration valid.txt --name NAME --out FOLDER [--only w4 …]

Each preset is planned and run as shipped in two processes of their own, with two changes: the calibration text, and at
most SAMPLES × TOKENS of it; two windows of the same text are evaluated. Times are CPU seconds of one thread, estimated
and found, so that other programs on the machine do not matter; the peak is the kernel's of the running process.
Writes evals/results/plan-NAME.json after every process, and goes on where it was stopped: without an `estimated` in
its row, a preset is planned again, and its run stands as it was found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import click
from study import resident_bytes

from llmcompress.evaluation.environment import machine, versions
from llmcompress.presets import load_preset
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe

PRESETS = ("w4", "w3", "w8a8", "sparse-2-4", "width-25", "llm-pruner", "svd-llm-20", "depth-25")
WINDOW, WINDOWS = 512, 2
COMPARED = ("bytes", "peak_bytes", "seconds")


@click.command()
@click.option("--model", required=True)
@click.option("--calibration", required=True)
@click.option("--name", required=True, help="of the result file")
@click.option("--samples", default=16, show_default=True)
@click.option("--tokens", default=512, show_default=True)
@click.option("--only", "chosen", multiple=True, default=PRESETS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="an empty folder for results")
@click.option("--one", hidden=True, nargs=2)
def main(
    model: str,
    calibration: str,
    name: str,
    samples: int,
    tokens: int,
    chosen: tuple[str, ...],
    out: Path,
    one: tuple[str, str] | None,
) -> None:
    """Plan and run every preset, unless the result file knows what it takes."""
    if one is not None:
        what, preset = one
        given = recipe(preset, calibration, samples, tokens)
        print(json.dumps(estimated(model, given) if what == "estimated" else found(model, given, out / preset)))
        return
    path = Path(__file__).parent / "results" / f"plan-{name}.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    facts |= {
        "model": name,
        "calibration": Path(calibration).name,
        "samples": samples,
        "tokens": tokens,
        "versions": versions(),
        "machine": machine(),
    }
    rows = {row["preset"]: row for row in facts["rows"]}
    for preset, key in product(chosen, ("estimated", "found")):
        row = rows.setdefault(preset, {"preset": preset})
        if key in row:
            continue
        row[key] = in_its_own_process(key, preset)
        if "estimated" in row and "found" in row:
            row["ratios"] = {each: row["estimated"][each] / row["found"][each] for each in COMPARED}
            click.echo(json.dumps({"preset": preset, "ratios": row["ratios"]}), err=True)
        facts["rows"] = list(rows.values())
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


class Stages(Silent):
    """CPU seconds at which every stage began, and at which `compress` had done its last step."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.ended = 0.0

    def stage(self, title: str, steps: int) -> None:
        """It begins."""
        self.began[title] = time.process_time()

    def step(self, text: str) -> None:
        """A step of the stage that began last."""
        if next(reversed(self.began)) == "compress":
            self.ended = time.process_time()


def in_its_own_process(what: str, preset: str) -> dict[str, Any]:
    """What the program prints on its last line."""
    command = [sys.executable, *sys.argv, "--one", what, preset]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def recipe(preset: str, calibration: str, samples: int, tokens: int) -> Recipe:
    """The preset with less text."""
    shipped = load_preset(preset).calibration
    text = {"source": calibration, "window": WINDOW, "bos": "always", "max_windows": WINDOWS}
    settings = [
        f"calibration.source={calibration}",
        f"calibration.samples={min(samples, shipped.samples)}",
        f"calibration.tokens={min(tokens, shipped.tokens)}",
        f"evaluate.perplexity={json.dumps([text])}",
    ]
    return load_preset(preset, settings=settings)


def estimated(model: str, given: Recipe) -> dict[str, Any]:
    """The plan, with CPU seconds in place of those of the wall."""
    import torch

    from llmcompress.cost import this_machine
    from llmcompress.known_model import known_model
    from llmcompress.loading.source import find_source
    from llmcompress.planning import make_plan, within_target_limits
    from llmcompress.trial_run import Bench, with_trial

    torch.set_num_threads(1)
    cpu, here = torch.device("cpu"), this_machine(torch.device("cpu"))
    given, source = within_target_limits(given.for_model(model)), find_source(model)
    known = known_model(source)
    counted = make_plan(known, given, machine=here)
    started = time.process_time()
    probed = with_trial(counted, given, Bench(source, known, cpu, clock=time.process_time))
    return {
        "bytes": probed.output_bytes,
        "peak_bytes": probed.peak_memory_bytes,
        "seconds": probed.estimated_seconds,
        "seconds_counted": counted.estimated_seconds,
        "blocks": probed.probed_blocks,
        "probe_seconds": time.process_time() - started,
        "warnings": probed.warnings,
    }


def found(model: str, given: Recipe, out: Path) -> dict[str, Any]:
    """The run: its stage `compress` alone is timed, its whole process measured."""
    import torch

    from llmcompress.pipeline import compress

    torch.set_num_threads(1)
    watched = Stages()
    report = compress(model, given, out, overwrite=True, progress=watched).report
    return {
        "bytes": report.bytes_compressed,
        "peak_bytes": resident_bytes("VmHWM"),
        "seconds": watched.ended - watched.began["compress"],
        "stages": report.seconds,
    }


if __name__ == "__main__":
    main()
