"""Tables of sparsity, depth and width pruning, and low rank."""

from __future__ import annotations

import math
from statistics import mean

from tables.cells import Facts, calibrated, environment, grid, markdown, protocol, spread

SPARSE = {
    "masks": "sparsity",
    "budgets": "sparsity, allocated over all blocks",
    "rounded": "sparsity, and the rest in `int4_g32`",
}


LOW_RANK = {
    "factors": "factors instead of linears",
    "branches": "a branch beside codes",
    "chains": "factors, then codes",
    "cuts": "ranks cut at once or in steps",
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
    return "\n\n".join([calibrated(facts), markdown(["sparsity", "method", "ours", peer], rows), environment(facts)])


def depth(facts: Facts) -> str:
    """Method by number of removed blocks; every choice there is, first."""
    dense = facts["dense"]["perplexity"]
    cells = {(row["method"], row["remove"]): row["perplexity"] for row in facts["rows"]}
    counts = list(dict.fromkeys(count for _, count in cells))
    methods = dict.fromkeys(method for method, _ in cells)
    rows = [[method, *(spread(cells.get((method, count)), dense) for count in counts)] for method in methods]
    header = ["blocks chosen by", *(f"{count} of {facts['blocks']} removed" for count in counts)]
    return "\n\n".join([calibrated(facts), markdown(header, rows), environment(facts)])


def greedy_depth(facts: Facts) -> str:
    """What evaluating fewer blocks in every round costs and saves."""
    body = []
    for trial in facts["trials"]:
        cells = []
        for text, found in trial["texts"].items():
            loss, dense = sum(found["nats"]), trial["dense_nats"][text]
            tokens = sum(facts["tokens"][text])
            cells.append(f"{math.exp(loss / tokens):.2f}, ×{math.exp((loss - dense) / tokens):.3f}")
        body.append([trial["method"], *cells, f"{trial['cpu_seconds']:,.0f}"])
    told, texts = facts["protocol"], list(facts["trials"][0]["texts"])
    model, windows = facts["model"].removeprefix("greedy-depth-"), protocol(told["window"], told["bos"])
    about = (
        f"**{model}** without a quarter of its blocks: perplexity ({windows}), × dense; calibrated on "
        f"{told['samples']} × {told['tokens']} tokens of WikiText-2 valid, one draw. `screen`: how many blocks are "
        "evaluated in every round, those of least influence."
    )
    return "\n\n".join([about, markdown(["blocks chosen by", *texts, "CPU s"], body), environment(facts)])


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


def modular(facts: Facts) -> str:
    """Perplexity and parameters of the blocks' linears, method by share removed."""
    dense = facts["dense"]["perplexity"]
    found = [row for row in facts["rows"] if row["part"] == "modular"]
    rows = [[row["share"], row["method"], spread(row["perplexity"], dense), f"{row['parameters']:,}"] for row in found]
    header = ["asked for", "method", "perplexity", f"parameters (dense {facts['parameters']:,})"]
    return "\n\n".join([calibrated(facts), markdown(header, rows), environment(facts)])


def low_rank(facts: Facts) -> str:
    """One table for each question."""
    rows = facts["rows"]
    flat = {**facts, "rows": [row for part in rows.values() for row in part]}
    tables = [grid(facts, rows[part], "setting", title) for part, title in LOW_RANK.items() if part in rows]
    return "\n\n".join([calibrated(flat), *tables, environment(facts)])


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
    """Every section by itself, each row with its sparsity."""
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
        parts.append(markdown([section, "perplexity", "sparsity of the blocks", "parameters"], rows))
    return "\n\n".join([*parts, environment(facts)])
