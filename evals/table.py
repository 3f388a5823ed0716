"""Writes docs/results.md, and the results of the bundled model in the README, from evals/results/*.json.

    python evals/table.py            rewrite docs/results.md and the part of README.md between the `results` markers
    python evals/table.py --check    exit with 1 when one of them is out of date

Nobody edits them by hand. Standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
METHODS = ("rtn", "rtn, range mse", "gptq", "awq", "awq→gptq")
ABOUT = """# Results

Every table is made by `python evals/table.py` from the files in `evals/results/`, and those by the programs in
[evals/](../evals/README.md). Lower perplexity is better; × is the ratio to the dense model.
"""

Facts = dict[str, Any]


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
        readme: with_results(readme.read_text(encoding="utf-8"), render(folder, short=True)),
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
        Section("Weights only", quantization, "quantization-*.json", "quantization-books-llama.json"),
        Section(
            "Codes, against llm-compressor, GPTQModel and AutoRound",
            codes_peer,
            "peers-quantization-*.json",
        ),
        Section(
            "Weights and activations in 8 bits, with outlier channels",
            outliers,
            "outliers-*.json",
            "outliers-books-llama.json",
        ),
        Section("Bits shared out, low-bit helpers", allocation, "allocation-*.json"),
        Section("Zeros", sparse, "sparse-*.json", "sparse-books-llama.json"),
        Section("Zeros, against llm-compressor", sparse_peer, "peers-sparse-quality-*.json"),
        Section("What zeros cost, against llm-compressor", sparse_seconds, "peers-sparse-seconds.json"),
        Section("Prune or quantize, at equal bytes", equal_bytes, "equal-bytes-*.json"),
        Section("Fewer blocks", depth, "depth-*.json"),
        Section("Fewer heads and FFN channels", width, "width-*.json", "width-books-llama.json"),
        Section("FFN channels, against Torch-Pruning", width_peer, "peers-width-*.json"),
        Section("Narrower residual stream: SliceGPT", slicegpt, "slicegpt-*.json", "slicegpt-books-llama.json"),
        Section("Thinner everywhere: MoDeGPT, SliceGPT, SVD", modular, "decomposition-*.json"),
        Section("Low rank", low_rank, "low-rank-*.json", "low-rank-books-llama.json"),
        Section("At initialisation and in training", at_init, "at-init-*.json"),
        Section("Per input", dynamic, "dynamic-*.json"),
        Section("Tokens per second", speed, "speed-*.json", "speed-cpu-m110.json"),
        Section("What quantizing costs", seconds, "seconds.json", "seconds.json"),
        Section("Memory of a run whose weights stay on disk", memory, "memory-*.json"),
        Section("Mapping a family from its config alone", map_time, "map-time.json"),
    ]


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


def codes_peer(facts: Facts) -> str:
    """Who and how by scheme; a reason where a peer could not."""
    dense = facts["dense"]["perplexity"]
    cells = {(row["who"], row["method"], row["scheme"]): row for row in facts["rows"]}
    schemes = list(dict.fromkeys(row["scheme"] for row in facts["rows"]))
    notes: list[str] = []

    def cell(row: Facts | None) -> str:
        if not row or not (row["perplexity"] or row.get("reason")):
            return "–"
        if row.get("reason") or row.get("note"):
            said = f"{row['who']} {row['method']}: {row.get('reason') or row['note']}"
            if said not in notes:
                notes.append(said)
        if not row["perplexity"]:
            return "fails"
        short = "" if len(row["perplexity"]) == most or row["method"] == "rtn" else f" ({len(row['perplexity'])} draw)"
        return f"{spread(row['perplexity'], dense)}{short}, {mean(row['cpu_seconds']):.0f} s"

    most = max(len(row["perplexity"]) for row in facts["rows"])
    lines = dict.fromkeys((row["who"], row["method"]) for row in facts["rows"])
    body = [[who, method, *(cell(cells.get((who, method, scheme))) for scheme in schemes)] for who, method in lines]
    flat = {**facts, "rows": [row for row in facts["rows"] if row["perplexity"]]}
    peers = ", ".join(
        f"{name} {found.get(name, found.get('llmcompressor', ''))}" for name, found in facts["peer_versions"].items()
    )
    told = [
        "Everybody gets the same tokens; embedding and head stay dense; seconds are CPU seconds of one process. "
        f"{peers}.",
        f"`best` is `{facts['recipes']['best'].replace('{{', '{').replace('}}', '}')}`.",
    ]
    said = [f"{note}." for note in notes]
    table = markdown(["", "method", *(f"`{scheme}`" for scheme in schemes)], body)
    return "\n\n".join([f"{calibrated(flat)} {' '.join(told)}", table, *said, environment(facts)])


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


def grid(facts: Facts, rows: Sequence[Facts], column: str, title: str, *, line: str = "method") -> str:
    """One line per method, one column per setting."""
    dense = facts["dense"]["perplexity"]
    cells = {(row[line], row[column]): row["perplexity"] for row in rows}
    columns = list(dict.fromkeys(row[column] for row in rows))
    lines = dict.fromkeys(row[line] for row in rows)
    body = [[each, *(spread(cells.get((each, where)), dense) for where in columns)] for each in lines]
    return markdown([title, *map(str, columns)], body)


def slicegpt(facts: Facts) -> str:
    """Form and basis by share of the width removed, and the parameters that are left."""
    rows = facts["rows"]
    sizes = {(row["method"], row["ratio"]): row["parameters"] for row in rows}
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    methods = dict.fromkeys(row["method"] for row in rows)
    left = [[each, *(f"{sizes[each, ratio]:,}" for ratio in ratios)] for each in methods]
    return "\n\n".join(
        [
            calibrated(facts),
            grid(facts, rows, "ratio", "removed from the width"),
            markdown([f"parameters (dense {facts['parameters']:,})", *ratios], left),
            environment(facts),
        ]
    )


LOW_RANK = {
    "factors": "factors instead of linears",
    "branches": "a branch beside codes",
    "chains": "factors, then codes",
    "cuts": "ranks cut at once or in steps",
}


def low_rank(facts: Facts) -> str:
    """One table for each question."""
    rows = facts["rows"]
    flat = {**facts, "rows": [row for part in rows.values() for row in part]}
    tables = [grid(facts, rows[part], "setting", title) for part, title in LOW_RANK.items() if part in rows]
    return "\n\n".join([calibrated(flat), *tables, environment(facts)])


def allocation(facts: Facts) -> str:
    """One table for each part of the program."""
    rows = facts["rows"]
    flat = {**facts, "rows": [row for part in rows.values() for row in part]}
    tables = [grid(facts, part, "setting", name) for name, part in rows.items() if part]
    return "\n\n".join([calibrated(flat), *tables, environment(facts)])


def width_peer(facts: Facts) -> str:
    """Both programs with the same number of parameters."""
    dense = facts["dense"]
    rows = [
        [f"{row['ratio']:.0%}", row["method"], spread(row["perplexity"], dense["perplexity"])] for row in facts["rows"]
    ]
    head = (
        f"**{facts['model']}**: dense perplexity {dense['perplexity']:.3f} on `{dense['text']}` "
        f"({protocol(dense['window'], dense['bos'])}); the same calibration windows and number of parameters for both."
    )
    return "\n\n".join([head, markdown(["channels removed", "method", "perplexity"], rows), environment(facts)])


def equal_bytes(facts: Facts) -> str:
    """Bits charged and bits on disk per weight, on two texts."""
    rows = [
        [row["method"], f"{row['bits']:g}", f"{row['bits_on_disk']:g}", f"{row['easy']:.2f}", f"{row['hard']:.2f}"]
        for row in facts["rows"]
    ]
    head = (
        f"**{facts['model']}**: zeros are charged 16 bits a value that is left and one bit a place; no loader stores "
        "them so."
    )
    header = ["method", "bits charged", "bits on disk", f"`{facts['easy']}`", f"`{facts['hard']}`"]
    return "\n\n".join([head, markdown(header, rows), environment(facts)])


def at_init(facts: Facts) -> str:
    """Every section by itself, each row with its share of zeros."""
    parts = [
        f"**{facts['model']}** on `{facts['text']}` ({protocol(facts['window'], True)}); {facts['steps']} steps of 8 × "
        f"{facts['tokens']} tokens of `{facts['calibration']}` in every training."
    ]
    for section in dict.fromkeys(row["section"] for row in facts["rows"]):
        rows = [
            [row["method"], f"{mean(row['perplexity']):.2f}", f"{100 * row['zeros']:.0f} %", f"{row['parameters']:,}"]
            for row in facts["rows"]
            if row["section"] == section
        ]
        parts.append(markdown([section, "perplexity", "zeros in blocks", "parameters"], rows))
    return "\n\n".join([*parts, environment(facts)])


def seconds(facts: Facts) -> str:
    """CPU time in plain forward passes, and how it grows."""
    rows = [
        [row["method"], f"{row['samples']} × {facts['tokens']}", f"{mean(row['forwards']):.2f}"]
        for row in facts["rows"]
    ]
    head = (
        f"CPU time of one thread ÷ that of a plain float32 forward pass over the same tokens, on a Llama of "
        f"{facts['parameters'] / 1e6:.0f} M random weights; mapping, loading and saving left out."
    )
    tables = [markdown(["method", "calibration tokens", "forward passes"], rows)]
    if facts["growth"]:
        growing = [
            [row["method"], row["by"], ", ".join(map(str, row["values"])), f"{row['exponent']:.2f}"]
            for row in facts["growth"]
        ]
        tables.append(markdown(["method", "grows with", "values", "exponent"], growing))
    return "\n\n".join([head, *tables, environment(facts)])


def memory(facts: Facts) -> str:
    """Peak resident memory, and what the dry run foretold."""
    rows = [
        [
            str(row["blocks"]),
            row["offload"],
            f"{row['bytes_model'] / 1e6:,.0f} MB",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['foretold_bytes'] / 1e6:,.0f} MB",
        ]
        for row in facts["rows"]
    ]
    head = (
        f"**{facts['shape']}**, random weights in float16, gptq `{facts['scheme']}`, {facts['samples']} × "
        f"{facts['tokens']} calibration tokens, one process."
    )
    header = ["blocks", "--offload", "weights on disk", "peak resident", "foretold"]
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
