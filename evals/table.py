"""Writes docs/results.md, and a summary of it in the README, from evals/results/*.json.

    python evals/table.py            rewrite docs/results.md and the part of README.md between the `results` markers
    python evals/table.py --check    exit with 1 when one of them is out of date

Nobody edits them by hand. Standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tables import cost, presets, pruning, quantization
from tables.cells import Facts
from tables.summary import LINES, MODEL, summary

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
ABOUT = """# Results

Every table is made by `python evals/table.py` from the files in `evals/results/`, and those by the programs in
[evals/](../evals/README.md). Lower perplexity is better; × is the ratio to the dense model.
"""


class Section(NamedTuple):
    """Tables of one kind."""

    title: str
    table: Callable[[Facts], str]
    pattern: str
    """Of the result files."""
    in_readme: str = ""
    """The one file that the README shows."""


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check both documents."""
    readme, results = ROOT / "README.md", ROOT / "docs" / "results.md"
    folder = ROOT / "evals" / "results"
    wanted = {
        readme: with_results(readme.read_text(encoding="utf-8"), shortened(folder)),
        results: f"{ABOUT}\n{render(folder, heading='##')}\n",
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} does not show evals/results/*.json: run `python evals/table.py`", file=sys.stderr)
        return bool(stale)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


def with_results(text: str, tables: str) -> str:
    """The README with new tables between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def sections() -> list[Section]:
    """What there is, in the order of the documents."""
    return [
        Section("Presets on a real model", presets.presets, "presets-*.json"),
        Section("Weights only", quantization.quantization, "quantization-*.json"),
        Section(
            "Codes, against llm-compressor, GPTQModel and AutoRound",
            quantization.codes_peer,
            "peers-quantization-*.json",
        ),
        Section(
            "Weights and activations in 8 bits, with outlier channels",
            quantization.outliers,
            "outliers-*.json",
        ),
        Section("Rotations, shifts and reordering", quantization.rotation, "rotation-*.json"),
        Section("Bits shared out, low-bit helpers", quantization.allocation, "allocation-*.json"),
        Section("Zeros", pruning.sparse, "sparse-*.json"),
        Section("Zeros, against llm-compressor", pruning.sparse_peer, "peers-sparse-quality-*.json"),
        Section("Prune or quantize, at equal bytes", pruning.equal_bytes, "equal-bytes-*.json"),
        Section("Fewer blocks", pruning.depth, "depth-*.json"),
        Section("Fewer heads and FFN channels", pruning.width, "width-*.json"),
        Section("FFN channels, against Torch-Pruning", pruning.width_peer, "peers-width-*.json"),
        Section("Narrower residual stream: SliceGPT", pruning.slicegpt, "slicegpt-*.json"),
        Section("Thinner everywhere: MoDeGPT, SliceGPT, SVD", pruning.modular, "decomposition-*.json"),
        Section("Low rank", pruning.low_rank, "low-rank-*.json"),
        Section("At initialisation and in training", pruning.at_init, "at-init-*.json"),
        Section("Per input", cost.dynamic, "dynamic-*.json"),
        Section("Tokens per second", cost.speed, "speed-*.json", "speed-cpu-m110.json"),
        Section("Tokens per second, per input", cost.dynamic_speed, "dynamic-speed-*.json"),
        Section("What compressing costs, against llm-compressor", cost.seconds, "seconds.json", "seconds.json"),
        Section("Memory of a run whose weights stay on disk", cost.memory, "memory-*.json"),
        Section("Mapping a family from its config alone", cost.map_time, "map-time.json"),
    ]


def shortened(folder: Path) -> str:
    """What the README shows."""
    files = {line.file: read(folder, f"{line.file}-{MODEL}.json") for line in LINES}
    known = {name: facts for name, (facts,) in files.items()}
    return f"### Perplexity\n\n{summary(known)}\n\n{render(folder, short=True)}"


def render(folder: Path, *, short: bool = False, heading: str = "###") -> str:
    """All tables, one section per kind of result; `short`: those of the README."""
    parts = []
    for section in sections():
        files = read(folder, section.in_readme if short else section.pattern) if section.in_readme or not short else []
        tables = [table for table in map(section.table, files) if table]
        if tables:
            parts.append(f"{heading} {section.title}\n\n" + "\n\n".join(tables))
    return "\n\n".join(parts) or "No result files yet: see `evals/README.md`."


def read(folder: Path, pattern: str) -> list[Facts]:
    """The result files of one kind, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
