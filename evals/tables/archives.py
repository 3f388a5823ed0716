"""The table of Deep Compression as archives, step by step. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tables.cells import Facts, environment, markdown, protocol
from tables.paired import Method, difference

_DENSE, _BESIDE = "dense", "gptq int4_g64, table int8"


def archives(facts: Facts) -> str:
    """A row per recipe, by bytes at rest."""
    told, texts = facts["protocol"], facts["protocol"]["texts"]
    rows = {trial["method"]: _method(trial) for trial in facts["trials"]}
    ordered = sorted(rows.values(), key=lambda row: -float(row.trials[0]["bytes"]))
    body = [_line(row, rows, facts, texts) for row in ordered]
    about = (
        f"**{facts['model'].removeprefix('deep-compression-')}**: every result as an archive (`export: [archive]`), "
        f"read back bit for bit; perplexity ({protocol(told['window'], told['bos'])}, {told['windows']} of a text) × "
        f"dense ± standard error over windows; KL from the dense model, nats per token over all texts; loss − int4: "
        f"nats per token minus those of `{_BESIDE}`, paired by window. Calibrated on {told['samples']} × "
        f"{told['tokens']} tokens of another text, one draw. Levels are those of k-means, one codebook for a matrix; "
        "codes are chosen with compensated errors unless a row says nearest; trained: levels and norms learn the dense "
        "model's distributions on the calibration text. The table is the token embedding, in bfloat16 unless a row "
        "says int8."
    )
    header = ["", "MB at rest", "MB in memory", *texts, "KL", "loss − int4", "CPU s"]
    return "\n\n".join([about, markdown(header, body), environment(facts)])


def _method(trial: Facts) -> Method:
    return Method("", "ours", trial["method"], ({"candidate": False, "draw": 0, **trial},))


def _line(row: Method, rows: dict[str, Method], facts: Facts, texts: Sequence[str]) -> list[str]:
    (trial,) = row.trials
    cells = []
    for text in texts:
        value = f"{row.perplexities(text, facts['tokens'][text])[0]:.2f}"
        if row.name != _DENSE:
            apart = difference(row, rows[_DENSE], facts, [text])
            value += f", ×{math.exp(apart.mean):.3f} ± {math.exp(apart.mean) * apart.error:.3f}"
        cells.append(value)
    kl, against = "", ""
    if row.name != _DENSE:
        of_dense = difference(row, rows[_DENSE], facts, texts, "kl")
        kl = f"{of_dense.mean:.3f} ± {of_dense.error:.3f}"
    if row.name not in (_DENSE, _BESIDE) and _BESIDE in rows:
        apart = difference(row, rows[_BESIDE], facts, texts)
        against = f"{apart.mean:+.3f} ± {apart.error:.3f}"
    megabytes = [trial[each] / 1e6 for each in ("bytes", "bytes_in_memory")]
    sizes = [f"{each:.2f}" if each < 10 else f"{each:.1f}" for each in megabytes]
    seconds = f"{trial['cpu_seconds']:.0f}" if row.name != _DENSE else ""
    return [row.name, *sizes, *cells, kl, against, seconds]
