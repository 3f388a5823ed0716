"""The tables of searches on a real model: families, optimizers and peers at equal bytes, and at equal latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, stdev

from tables.cells import Facts, environment, markdown

BITS, DECODE, JOINT = " bits / ", "decode ", "joint / exact"


def search(facts: Facts) -> str:
    """At equal bytes, uniform plans first; at equal seconds per token; and what was compressed for real."""
    rows, texts = {name: row for name, row in facts["rows"].items() if row}, list(facts["tests"])
    body = [_line(name, row, None, texts) for name, row in rows.items() if name.startswith("uniform")]
    at_bytes = [name for name in rows if BITS in name and not name.startswith(DECODE)]
    averages = sorted({name.split(BITS)[0] for name in at_bytes}, key=float, reverse=True)
    for average in averages:
        here = {name: row for name, row in rows.items() if name.startswith(f"{average}{BITS}")}
        reference = here.get(f"{average}{BITS}bits / exact")
        body += [_line(name, row, reference, texts) for name, row in here.items()]
    about = (
        f"**{facts['model']}**: plans put together from the same levels (gptq with joint ranges, groups of 64, "
        "table in 8 bits), at the bytes that so many bits per weight of the blocks take. Judged: mean KL from dense on "
        f"{facts['stages'][-1]:,} tokens of books valid, which no plan was calibrated or is reported on; then on "
        f"{' and '.join(f'{count} windows of {name}' for name, count in facts['tests'].items())} (512 tokens), and the "
        "difference from `exact` on bits at the same bytes, paired by window ± standard error. Tokens: forward tokens "
        "that the search itself took, a backward pass counted as two more. AutoScheme (auto-round) and AutoQuantize "
        "(ModelOpt) chose bits of 2, 3, 4 and 8 on the calibration windows; only their choice is compared here."
    )
    header = ["bits, family, optimizer", "MB", "judged", *texts]
    spent = ["tokens", "CPU s"]
    parts = [about, markdown([*header, *(f"{text} − exact" for text in texts), *spent], body)]
    if decoding := _decoding(facts["rows"], texts):
        parts += [
            "At equal seconds per decoded token: a sum from a table of ONNX Runtime (one thread of this processor), as "
            "a part of what uniform 4 bits take. Families that do not choose bits have 8. Differences from the joint "
            "space, paired by window ± standard error; –: no plan of the family is as fast.",
            markdown(["limit, family, optimizer", "ms/token", "MB", "judged", *texts,
                      *(f"{text} − joint" for text in texts)], decoding),
        ]  # fmt: skip
    if remade := {name: row["remade"] for name, row in rows.items() if "remade" in row}:
        made = [
            [name, *(f"{each['perplexity'][text]:.2f}, ×{each['ratio'][text]:.3f}" for text in texts)]
            for name, each in remade.items()
        ]
        parts += ["Compressed for real by the recipe of the plan: perplexity and its ratio to dense.",
                  markdown(["", *texts], made)]  # fmt: skip
    return "\n\n".join([*parts, environment(facts)])


def _decoding(rows: Mapping[str, Facts | None], texts: list[str]) -> list[list[str]]:
    """Rows whose seconds per token are limited."""
    found = []
    for name, row in rows.items():
        if not name.startswith(DECODE):
            continue
        if row is None:
            found.append([name, *["–"] * (3 + 2 * len(texts))])
            continue
        joint = rows.get(f"{name.split(' / ')[0]} / {JOINT}")
        means = [f"{mean(row['tested'][text]):.4f}" for text in texts]
        costs = [f"{1e3 * row['decode']:.2f}", f"{row['bytes'] / 1e6:.2f}"]
        found.append([name, *costs, f"{row['judged']:.4f}", *means, *_apart(row, joint, texts)])
    return found


def _line(name: str, row: Facts, reference: Facts | None, texts: list[str]) -> list[str]:
    tokens = f"{row['tokens']:,}" if "tokens" in row else ""
    seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
    means = [f"{mean(row['tested'][text]):.4f}" for text in texts]
    costs = [f"{row['bytes'] / 1e6:.2f}", f"{row['judged']:.4f}"]
    return [name, *costs, *means, *_apart(row, reference, texts), tokens, seconds]


def _apart(row: Facts, reference: Facts | None, texts: list[str]) -> list[str]:
    """From another row, text by text; nothing from itself."""
    if reference is None or reference is row:
        return [""] * len(texts)
    found = []
    for text in texts:
        apart = [one - other for one, other in zip(row["tested"][text], reference["tested"][text], strict=True)]
        found.append(f"{mean(apart):+.4f} ± {stdev(apart) / math.sqrt(len(apart)):.4f}")
    return found
