"""The table of searches on a real model: families, optimizers and peers at equal bytes."""

from __future__ import annotations

import math
from statistics import mean, stdev

from tables.cells import Facts, environment, markdown


def search(facts: Facts) -> str:
    """One block of rows for each limit, uniform plans first."""
    rows, texts = facts["rows"], list(facts["tests"])
    body = [_line(name, row, None, texts) for name, row in rows.items() if name.startswith("uniform")]
    averages = sorted({name.split(" bits / ")[0] for name in rows if " bits / " in name}, key=float, reverse=True)
    for average in averages:
        here = {name: row for name, row in rows.items() if name.startswith(f"{average} bits / ")}
        reference = here.get(f"{average} bits / bits / exact")
        body += [_line(name, row, reference, texts) for name, row in here.items()]
    remade = {name: row["remade"] for name, row in rows.items() if "remade" in row}
    about = (
        f"**{facts['model']}**: plans put together from the same levels (gptq with joint ranges, groups of 64, "
        "table in 8 bits), at the bytes that so many bits per weight of the blocks take. Judged: mean KL from dense on "
        f"{facts['stages'][-1]:,} tokens of books valid, which no plan was calibrated or is reported on; then on "
        f"{' and '.join(f'{count} windows of {name}' for name, count in facts['tests'].items())} (512 tokens), and the "
        "difference from `exact` at the same bytes, paired by window ± standard error. Tokens: forward tokens that the "
        "search itself took, a backward pass counted as two more. AutoScheme (auto-round) and AutoQuantize (ModelOpt) "
        "chose bits of 2, 3, 4 and 8 on the calibration windows; only their choice is compared here."
    )
    header = [
        "bits, family, optimizer",
        "MB",
        "judged",
        *texts,
        *(f"{text} − exact" for text in texts),
        "tokens",
        "CPU s",
    ]
    parts = [about, markdown(header, body)]
    if remade:
        made = [
            [name, *(f"{each['perplexity'][text]:.2f}, ×{each['ratio'][text]:.3f}" for text in texts)]
            for name, each in remade.items()
        ]
        parts += ["Compressed for real by the recipe of the plan: perplexity and its ratio to dense.",
                  markdown(["", *texts], made)]  # fmt: skip
    return "\n\n".join([*parts, environment(facts)])


def _line(name: str, row: Facts, reference: Facts | None, texts: list[str]) -> list[str]:
    apart = ["" if reference in (None, row) else _difference(row, reference, text) for text in texts]
    tokens = f"{row['tokens']:,}" if "tokens" in row else ""
    seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
    means = [f"{mean(row['tested'][text]):.4f}" for text in texts]
    return [name, f"{row['bytes'] / 1e6:.2f}", f"{row['judged']:.4f}", *means, *apart, tokens, seconds]


def _difference(row: Facts, reference: Facts | None, text: str) -> str:
    assert reference is not None
    apart = [one - other for one, other in zip(row["tested"][text], reference["tested"][text], strict=True)]
    return f"{mean(apart):+.4f} ± {stdev(apart) / math.sqrt(len(apart)):.4f}"
