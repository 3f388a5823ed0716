"""How fast every runtime decodes our int4 files of other shapes, beside its own int4: random weights, so speed alone.

    OMP_NUM_THREADS=1 python evals/export_shapes.py --shape m110 --shape m500

A random model of the shape (`speed.py`) is rounded to nearest in groups of 64, its table of embeddings and tied head to
8 bits, and exported; each runtime's own tool rounds the same dense model in the same groups (`exports/own.py`). All are
measured in turns, transformers with float32 among them. Writes evals/results/exported-shapes-cpu.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import torch
from exports.own import OWN_GENAI, OWN_GGUF, OWN_OPENVINO, own_roundings
from exports.turns import PROTOCOL, TURNS, Candidate, speeds
from speed import SHAPES, llama

from llmcompress import compress
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import parameters
from llmcompress.exporters.base import EXPORTERS
from llmcompress.model_export import export
from llmcompress.reopening import reopen

RESULTS = Path(__file__).resolve().parent / "results"
RECIPE = {"passes": [{"rtn": {"scheme": "int4_g64"}}, "embeddings"], "evaluate": {}}
BESIDE = {"gguf": OWN_GGUF, "onnx": None, "onnx_genai": OWN_GENAI, "openvino": OWN_OPENVINO}
"""Target → what its runtime's own tool makes with a table in 8 bits; that of ONNX Runtime has none."""


@click.command()
@click.option("--turns", default=TURNS, show_default=True)
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), default=("m110", "m500"))
def main(shapes: tuple[str, ...], turns: int) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as scratch:
            rows += rows_of(shape, Path(scratch), turns)
    facts = {
        "name": "cpu",
        "versions": versions(),
        "machine": machine(),
        "speed": {**PROTOCOL, "turns": turns},
        "rows": rows,
    }
    (RESULTS / "exported-shapes-cpu.json").write_text(json.dumps(facts, indent=1) + "\n")


def rows_of(shape: str, scratch: Path, turns: int) -> list[dict[str, object]]:
    """Dense, our files and the runtimes' own."""
    model, tokenizer = llama(**SHAPES[shape]), reopen("builtin:books-llama").tokenizer
    dense = scratch / "dense"
    model.to(torch.bfloat16).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    compress(str(dense), RECIPE, output=scratch / "w4")
    candidates, rows = list[Candidate](), dict[str, dict[str, object]]()
    for target, beside in BESIDE.items():
        report = export(scratch / "w4", target, scratch / target, run=False)[target]
        candidates.append(Candidate(target, scratch / target, EXPORTERS[target].runtime, beside))
        rows[target] = {"target": target, "bytes": report.bytes}
    for title, target, place, runner in own_roundings(str(dense), scratch, list(BESIDE)):
        if title in BESIDE.values():
            candidates.append(Candidate(title, place, runner))
            rows[title] = {"target": target, "own": True}
    measured = speeds(candidates, model.float(), turns=turns)
    common = {"shape": shape, "parameters": parameters(model)}
    return [{**common, "name": name, **rows.get(name, {}), **each} for name, each in measured.items()]


if __name__ == "__main__":
    main()
