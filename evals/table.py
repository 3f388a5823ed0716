"""Writes the result tables of the README from evals/results/*.json; nobody edits them by hand.

    python evals/table.py            rewrite the part of README.md between the `results` markers
    python evals/table.py --check    exit with 1 when that part is out of date

Standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
METHODS = ("rtn", "rtn, range mse", "gptq", "awq", "awq→gptq")

Facts = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = with_results(text, render(ROOT / "evals" / "results"))
    if "--check" not in arguments:
        readme.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print("README.md does not show evals/results/*.json: run `python evals/table.py`", file=sys.stderr)
        return 1
    return 0


def with_results(text: str, tables: str) -> str:
    """The README with new tables between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def render(folder: Path) -> str:
    """All tables, one section per kind of result."""
    sections = [
        ("Weights only", quantization, read(folder, "quantization-*.json")),
        ("Weights and activations in 8 bits, with outlier channels", outliers, read(folder, "outliers-*.json")),
        ("Zeros", sparse, read(folder, "sparse-*.json")),
        ("Zeros, against llm-compressor", sparse_peer, read(folder, "peers-sparse-quality-*.json")),
        ("What zeros cost, against llm-compressor", sparse_seconds, read(folder, "peers-sparse-seconds.json")),
        ("Fewer blocks", depth, read(folder, "depth-*.json")),
        ("Fewer heads and FFN channels", width, read(folder, "width-*.json")),
        ("Thinner everywhere: MoDeGPT, SliceGPT, SVD", modular, read(folder, "decomposition-*.json")),
        ("Per input", dynamic, read(folder, "dynamic-*.json")),
        ("Tokens per second", speed, read(folder, "speed-*.json")),
        ("Mapping a family from its config alone", map_time, read(folder, "map-time.json")),
    ]
    parts = [
        f"### {title}\n\n" + "\n\n".join(filter(None, map(table, files))) for title, table, files in sections if files
    ]
    return "\n\n".join(parts) or "No result files yet: see `evals/README.md`."


def read(folder: Path, pattern: str) -> list[Facts]:
    """The result files of one kind, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]


def quantization(facts: Facts) -> str:
    """Scheme by method: mean perplexity, range over calibration draws, ratio to dense."""
    dense = facts["dense"]
    cells = {(row["scheme"], row["method"]): row["perplexity"] for row in facts["rows"]}
    schemes = list(dict.fromkeys(row["scheme"] for row in facts["rows"]))
    methods = [method for method in METHODS if any((scheme, method) in cells for scheme in schemes)]
    rows = [
        [f"`{scheme}`", *(spread(cells.get((scheme, method)), dense["perplexity"]) for method in methods)]
        for scheme in schemes
    ]
    return "\n\n".join([calibrated(facts), markdown(["scheme", *methods], rows), environment(facts)])


def outliers(facts: Facts) -> str:
    """Each method on the model with outlier channels, against dense."""
    dense = next(row["perplexity"] for row in facts["rows"] if row["method"] == "dense")
    rows = [
        [row["method"], f"{row['perplexity']:.3f}", f"{100 * (row['perplexity'] / dense - 1):+.2f} %"]
        for row in facts["rows"]
    ]
    head = (
        f"**{facts['model']}**: {facts['channels']} channel(s) of every norm multiplied by {facts['gain']:g} and the "
        f"columns that read them divided by it, so the dense model is what it was. Perplexity on `{facts['text']}` "
        f"({protocol(facts['window'], facts['bos'])})."
    )
    return "\n\n".join([head, markdown(["method", "perplexity", "against dense"], rows), environment(facts)])


SPARSE = {
    "masks": "zeros",
    "budgets": "zeros, one budget for all blocks",
    "rounded": "zeros, and the rest in `int4_g32`",
}


def sparse(facts: Facts) -> str:
    """Method by share, one table for each question."""
    dense = facts["dense"]["perplexity"]
    tables = []
    for name, title in SPARSE.items():
        cells = {(row["method"], row["share"]): row["perplexity"] for row in facts["rows"] if row["table"] == name}
        shares = list(dict.fromkeys(share for _, share in cells))
        methods = dict.fromkeys(method for method, _ in cells)
        rows = [[method, *(spread(cells.get((method, share)), dense) for share in shares)] for method in methods]
        tables.append(markdown([title, *shares], rows))
    return "\n\n".join([calibrated(facts), *tables, environment(facts)])


def sparse_peer(facts: Facts) -> str:
    """Both programs on the same model, calibration tokens and measurement."""
    dense = facts["dense"]["perplexity"]
    rows = [
        [row["share"], row["method"], spread(row["ours"], dense), spread(row["peer"], dense)] for row in facts["rows"]
    ]
    peer = f"{facts['peer']} {facts['peer_versions']['llmcompressor']}"
    return "\n\n".join([calibrated(facts), markdown(["zeros", "method", "ours", peer], rows), environment(facts)])


def sparse_seconds(facts: Facts) -> str:
    """CPU seconds of one thread in plain forward passes."""
    rows = [
        [row["share"], row["method"], *(f"{mean(row[who]):.2f}" if row[who] else "–" for who in ("ours", "peer"))]
        for row in facts["rows"]
    ]
    head = (
        f"CPU time of one thread ÷ that of a plain float32 forward pass over the same {facts['samples']} × "
        f"{facts['tokens']} tokens, on a Llama of {facts['parameters'] / 1e6:.0f} M random weights; mean of "
        f"{len(facts['rows'][0]['ours'])} runs in turn."
    )
    peer = f"{facts['peer']} {facts['peer_versions'].get('llmcompressor', '')}"
    return "\n\n".join([head, markdown(["zeros", "method", "ours", peer], rows), environment(facts)])


def depth(facts: Facts) -> str:
    """Method by number of removed blocks; every choice there is, first."""
    dense = facts["dense"]["perplexity"]
    cells = {(row["method"], row["remove"]): row["perplexity"] for row in facts["rows"]}
    counts = list(dict.fromkeys(count for _, count in cells))
    methods = dict.fromkeys(method for method, _ in cells)
    rows = [[method, *(spread(cells.get((method, count)), dense) for count in counts)] for method in methods]
    header = ["blocks chosen by", *(f"{count} of {facts['blocks']} removed" for count in counts)]
    return "\n\n".join([calibrated(facts), markdown(header, rows), environment(facts)])


def width(facts: Facts) -> str:
    """Score by kind of refit, all at the same number of parameters but for biases."""
    dense = facts["dense"]["perplexity"]
    cells = {(row["variant"], row["refit"]): row["perplexity"] for row in facts["rows"]}
    refits = list(dict.fromkeys(refit for _, refit in cells))
    variants = dict.fromkeys(variant for variant, _ in cells)
    rows = [[variant, *(spread(cells.get((variant, refit)), dense) for refit in refits)] for variant in variants]
    head = f"{calibrated(facts)} {100 * facts['ratio']:g} % of heads and of channels removed from every block."
    header = ["score", *(f"refit: {refit}" for refit in refits)]
    return "\n\n".join([head, markdown(header, rows), environment(facts)])


def modular(facts: Facts) -> str:
    """Perplexity and parameters of the blocks' linears, method by share removed."""
    dense = facts["dense"]["perplexity"]
    found = [row for row in facts["rows"] if row["part"] == "modular"]
    rows = [[row["share"], row["method"], spread(row["perplexity"], dense), f"{row['parameters']:,}"] for row in found]
    header = ["asked for", "method", "perplexity", f"parameters (dense {facts['parameters']:,})"]
    return "\n\n".join([calibrated(facts), markdown(header, rows), environment(facts)])


def dynamic(facts: Facts) -> str:
    """Mean share of blocks and of inputs that were used, and what it cost."""
    if "text" not in facts:
        return ""
    dense = next(row["perplexity"] for row in facts["rows"] if row["method"] == "dense")
    rows = [
        [
            row["method"],
            f"{row['perplexity']:.2f}, ×{row['perplexity'] / dense:.3f}",
            f"{100 * row['depth']:.0f} %",
            f"{100 * row.get('active', 1.0):.0f} %",
        ]
        for row in facts["rows"]
    ]
    head = (
        f"**{facts['model']}** on `{facts['text']}` ({protocol(facts['window'], True)}); thresholds from "
        f"`{facts['calibration']}`."
    )
    return "\n\n".join(
        [head, markdown(["method", "perplexity", "blocks run", "inputs used"], rows), environment(facts)]
    )


def speed(facts: Facts) -> str:
    """Ratios to the dense model, measured in turn in one process."""
    rows = [
        [
            row["method"],
            f"{100 * row['share']:.0f} %",
            f"×{row['decode_ratio']:.2f}",
            f"×{row['prefill_ratio']:.2f}",
            "yes" if row["faster"] else "no",
        ]
        for row in facts["rows"]
    ]
    head = (
        f"**{facts['rows'][0]['shape']}**, random weights, float32, {facts['threads']} thread(s), batch 1, "
        f"{facts['prompt_tokens']} + {facts['new_tokens']} tokens, median of {facts['repeats']} ({facts['clock']} "
        f"time). One and the same model differs by ×{facts['rows'][0]['decode_ratio']:.3f} from itself."
    )
    header = ["method", "parameters", "decode", "prefill", "faster"]
    return "\n\n".join([head, markdown(header, rows), environment(facts)])


def calibrated(facts: Facts) -> str:
    """What was measured, on what, calibrated how."""
    dense = facts["dense"]
    draws = max(len(row.get("perplexity") or row["ours"]) for row in facts["rows"])
    return (
        f"**{facts['model']}**: dense perplexity {dense['perplexity']:.3f} on `{dense['text']}` "
        f"({protocol(dense['window'], dense['bos'])}, {dense['tokens']:,} tokens). "
        f"Calibrated on up to {facts['samples']} × {facts['tokens']} tokens of `{facts['calibration']}`; "
        f"mean (lowest–highest) of {draws} calibration draws, × dense."
    )


def map_time(facts: Facts) -> str:
    """Seconds to map one block."""
    rows = [[row["shape"], f"{row['seconds']:.1f}", str(row["sites"]), str(row["folds"])] for row in facts["rows"]]
    return markdown(["width / feed-forward", "seconds", "sites", "folds"], rows) + "\n\n" + environment(facts)


def spread(found: Sequence[float] | None, dense: float) -> str:
    """`mean (lowest–highest), ×ratio`; the range only where there is one."""
    if not found:
        return "–"
    between = f" ({min(found):.2f}–{max(found):.2f})" if len(found) > 1 else ""
    return f"{mean(found):.2f}{between}, ×{mean(found) / dense:.3f}"


def protocol(window: int, bos: bool) -> str:
    """How perplexity was measured."""
    return f"non-overlapping windows of {window}, {'each with' if bos else 'without'} BOS"


def environment(facts: Facts) -> str:
    """Where the numbers come from."""
    versions, machine = facts["versions"], facts["machine"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    return f"<sub>{packages}; {machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores</sub>"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
