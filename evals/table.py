"""Writes docs/results.md, and the tables between markers in other documents, from evals/results/*.json.

    python evals/table.py            rewrite docs/results.md, and what stands between the `results` markers elsewhere
    python evals/table.py --check    exit with 1 when one of them is out of date

Nobody edits them by hand. Standard library only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tables import (
    archives,
    cost,
    distillation,
    exports,
    headline,
    hub,
    latency,
    presets,
    pruning,
    quantization,
    real,
    search,
    search_optimizers,
    search_proxies,
    training,
)
from tables.cells import Facts
from tables.summary import LINES, MODEL, summary

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- results: ([\w.-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
"""What a document shows: a result file of one table, or one of `named_tables`."""
ABOUT = """# Results

`python evals/table.py` writes every table from the files in `evals/results/`, which the programs in
[evals/](../evals/README.md) measure. Lower perplexity is better; × is the ratio to the dense model. The models of most
tables are small: measure yours before you decide.

How the seconds of `gptq` and `awq` grow with blocks, width and samples (`python evals/plots.py`, from the same files):

![CPU seconds against blocks, width and samples, on logarithmic axes](growth.svg)

A real model, SmolLM2-135M-Instruct, ours and the peers' (`python evals/quality_bytes.py`, from the first
tables; rows beyond ×12 are left out):

![Perplexity ÷ dense against megabytes of weights](quality-bytes.svg)
"""


class Section(NamedTuple):
    """Tables of one kind."""

    title: str
    table: Callable[[Facts], str]
    pattern: str
    """Of the result files."""


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check both documents."""
    results = ROOT / "docs" / "results.md"
    folder = ROOT / "evals" / "results"
    first = f"## Every kind of compression, on the bundled model\n\n{overview(folder)}"
    wanted = {results: f"{ABOUT}\n{first}\n\n{render(folder)}\n"}
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = document.read_text(encoding="utf-8")
        if document != results and MARKED.search(text):
            wanted[document] = with_results(text, folder)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} does not show evals/results/*.json: run `python evals/table.py`", file=sys.stderr)
        return bool(stale)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


def with_results(text: str, folder: Path) -> str:
    """A document with new tables between its markers."""
    return MARKED.sub(lambda found: f"{found[1]}{named_table(found[2], folder)}\n{found[3]}", text)


def named_table(name: str, folder: Path) -> str:
    """A table by its name, or that of its result file."""
    if name == "overview":
        return overview(folder)
    if name == "real-short":
        (measured,) = read(folder, f"real-{real.MODEL}.json")
        return real.short(measured)
    if name == "hub-models":
        return hub.hub_models(json.loads((ROOT / "tests" / "hub_configs.json").read_text(encoding="utf-8")))
    path = folder / f"{name}.json"
    section = next((each for each in sections() if path.match(each.pattern)), None)
    if section is None or not path.exists():
        raise SystemExit(f"`<!-- results: {name} -->` names no table")
    return section.table(json.loads(path.read_text(encoding="utf-8")))


def sections() -> list[Section]:
    """What there is, in the order of the documents."""
    return [
        Section("Bytes, quality, tasks and cost of presets", headline.headline, "headline-*.json"),
        Section("With and without quantization-aware training", headline.survey, "trained-*.json"),
        Section("Presets on a real model", presets.presets, "presets-*.json"),
        Section("What a plan estimates, on a real model", presets.plans, "plan-*.json"),
        Section("Export targets on a real model", exports.exports, "export-*.json"),
        Section("Deep Compression step by step, as archives", archives.archives, "deep-compression-*.json"),
        Section("Export targets: speed of other shapes", exports.shapes, "exported-shapes-*.json"),
        Section("Search on a real model, at equal bytes", search.search, "search-SmolLM2-*.json"),
        Section("Quantization-aware training on a real model", training.qat, "qat-SmolLM2-*.json"),
        Section("Quantization-aware training on the bundled model", training.qat_small, "qat-books-*.json"),
        Section("Healing a pruned real model", training.healing, "healing-*.json"),
        Section("Training steps, against TRL", training.speed, "training-speed-*.json"),
        Section("A real model, against llm-compressor and AutoRound", real.everything, "real-*.json"),
        Section("Weight-only quantization", quantization.quantization, "quantization-*.json"),
        Section(
            "Weight-only quantization, against llm-compressor, GPTQModel and AutoRound",
            quantization.codes_peer,
            "peers-quantization-*.json",
        ),
        Section(
            "Weights and activations in 8 bits, with outlier channels",
            quantization.outliers,
            "outliers-*.json",
        ),
        Section("Rotations, shifts and reordering", quantization.rotation, "rotation-*.json"),
        Section("Mixed precision and low-bit corrections", quantization.allocation, "allocation-*.json"),
        Section("Unstructured and N:M sparsity", pruning.sparse, "sparse-*.json"),
        Section(
            "Unstructured and N:M sparsity, against llm-compressor", pruning.sparse_peer, "peers-sparse-quality-*.json"
        ),
        Section("Prune or quantize, at equal bytes", pruning.equal_bytes, "equal-bytes-*.json"),
        Section("Depth pruning", pruning.depth, "depth-*.json"),
        Section("Greedy depth pruning of a real model", pruning.greedy_depth, "greedy-depth-*.json"),
        Section("Width pruning: heads and FFN channels", pruning.width, "width-*.json"),
        Section("Width pruning of FFN channels, against Torch-Pruning", pruning.width_peer, "peers-width-*.json"),
        Section("Slicing the residual stream: SliceGPT", pruning.slicegpt, "slicegpt-*.json"),
        Section("MoDeGPT, SliceGPT and SVD at equal compression", pruning.modular, "decomposition-*.json"),
        Section("Low rank", pruning.low_rank, "low-rank-*.json"),
        Section("Pruning at initialization and during training", pruning.at_init, "at-init-*.json"),
        Section("Distillation: every objective on one student", distillation.objectives, "distillation-*.json"),
        Section("The loss around students of different objectives", distillation.landscapes, "landscapes-*.json"),
        Section("Search: what stands in for the loss", search_proxies.proxies, "search-proxies-*.json"),
        Section("Search: optimizers on a table of all plans", search_optimizers.optimizers, "optimizers-*.json"),
        Section("Dynamic inference", cost.dynamic, "dynamic-*.json"),
        Section("Tokens per second", cost.speed, "speed-*.json"),
        Section("Two runs of `llmcompress speed`", cost.repeated_speed, "repeat-speed-*.json"),
        Section("Tokens per second, dynamic inference", cost.dynamic_speed, "dynamic-speed-*.json"),
        Section("Latency of plans: sums of parts, and whole models", latency.latency, "latency-*.json"),
        Section("Compression time, against llm-compressor", cost.seconds, "seconds.json"),
        Section("Memory of a run with weight offloading", cost.memory, "memory-*.json"),
        Section("Mapping a family from its config", cost.map_time, "map-time.json"),
    ]


def overview(folder: Path) -> str:
    """Every kind of compression on the bundled model, each beside its naive baseline."""
    files = {line.file: read(folder, f"{line.file}-{MODEL}.json") for line in LINES}
    return summary({name: facts for name, (facts,) in files.items()})


def render(folder: Path) -> str:
    """All tables, one section per kind of result."""
    parts = []
    for section in sections():
        tables = [table for table in map(section.table, read(folder, section.pattern)) if table]
        if tables:
            parts.append(f"## {section.title}\n\n" + "\n\n".join(tables))
    return "\n\n".join(parts) or "No result files yet: see `evals/README.md`."


def read(folder: Path, pattern: str) -> list[Facts]:
    """The result files of one kind, by name."""
    paths = sorted(folder.glob(pattern), key=lambda path: path.stem)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
