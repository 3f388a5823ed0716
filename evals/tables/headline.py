"""The headline: presets on a real model, with bytes, quality, tasks and cost in one table."""

from __future__ import annotations

import json
import re
from math import sqrt
from pathlib import Path
from typing import Any

from tables.cells import Facts, environment, markdown, protocol

RESULTS = Path(__file__).resolve().parent.parent / "results"
Z_95 = 1.96
_BLIMP = "local_blimp_"


def headline(facts: Facts) -> str:
    """A row per preset and runtime; the dense model first."""
    rows = facts["rows"]
    if not rows:
        return ""
    header = ["", "runtime", "MB", *facts["texts"], "KL", "equal top tokens", "tasks", *_COST]
    body = [_dense(rows[0], facts), *(_row(row, facts) for row in rows)]
    return "\n\n".join([_about(facts), markdown(header, body), environment(facts)])


def survey(facts: Facts) -> str:
    """Dense, post-training and quantization-aware, by bits: accuracy, perplexity, latency and size."""
    path = RESULTS / f"headline-{facts['model']}.json"
    presets = {(row["preset"], row["runner"]): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    texts, first = facts["texts"], facts["rows"][0]
    base = first["cost"][0]
    texts_of_dense = [f"{each['dense']:.2f}" for each in first["quality"]]
    body = [
        ["dense", "", _dense_score(first), *texts_of_dense, _megabytes(base), f"{_rate(base, None, 'decode')} (torch)"]
    ]
    for row in sorted(facts["rows"], key=lambda row: str(row["preset"]), reverse=True):
        bits = row["preset"].removeprefix("int")[0]
        preset = f"w{bits}"
        base, cost = row["cost"]
        sizes = _megabytes(cost), f"{_rate(cost, base, 'decode')} ({cost['runtime']})"
        for how, each, known in (
            (f"post-training (`{preset}`)", presets[preset, "torch"], ("", "")),
            ("quantization-aware", row, sizes),
        ):
            quality = [_score(_compared(each)), *(_perplexity(text) for text in each["quality"])]
            body.append([f"{bits} bits", how, *quality, *known])
    about = (
        f"**{facts['model']}**: tasks (mean over {_tasks_of(facts)}, {facts['limit']} documents each, change from "
        f"dense with its 95 % interval) and perplexity ({protocol(facts['window'], facts['bos'])}, × dense ± standard "
        f"error) of the presets of so many bits and of {_groups(facts)} that were trained; size of the trained model "
        "in the fastest runtime that was measured with it, and decoded tokens per second there, × the dense model in "
        "turns with it. Trained with KL to the dense model: text, tokens and CPU seconds are in the table of "
        "quantization-aware training."
    )
    header = ["weights", "", "tasks", *texts, "MB", "decode tokens/s"]
    return "\n\n".join([about, markdown(header, body), environment(facts)])


def _about(facts: Facts) -> str:
    speed, calibration = facts["speed"], facts["calibration"]
    return (
        f"**{facts['model']}**: perplexity ({protocol(facts['window'], facts['bos'])}) and × dense ± standard error; "
        f"KL in nats per token and equal top tokens, means over the texts; tasks: mean over {_tasks_of(facts)}, "
        f"{facts['limit']} documents each, change from dense with its 95 % interval. Calibrated on "
        f"{calibration['samples']} × {calibration['tokens']} tokens of {calibration['source']}. Tokens/s: prompt of "
        f"{speed['prompt']}, {speed['new']} new, median of {speed['turns']} turns, {speed['threads']} thread"
        f"{'' if speed['threads'] == 1 else 's'}, × the dense model in turns with it."
    )


def _tasks_of(facts: Facts) -> str:
    names = [each["task"] for each in _compared(facts["rows"][0])]
    paradigms = [name for name in names if name.startswith(_BLIMP)]
    others = [name for name in names if name not in paradigms]
    told = [f"{len(paradigms)} paradigms of BLiMP"] if paradigms else []
    return ", ".join([*others, *told]) or "no task"


def _compared(row: Facts) -> list[Facts]:
    """Every task once: not BLiMP's mean beside its paradigms."""
    found: list[Facts] = row["tasks"]["comparisons"]
    return [each for each in found if f"{each['task']}_" != _BLIMP]


def _groups(facts: Facts) -> str:
    sizes = {re.search(r"_g(\d+)", row["preset"]) for row in facts["rows"]}
    (size,) = {found[1] for found in sizes if found}
    return f"groups of {size}"


def _dense(row: Facts, facts: Facts) -> list[str]:
    quality = row["quality"]
    texts = [f"{each['dense']:.2f}" for each in quality]
    cost = row["cost"][0]
    return [
        "dense",
        "torch",
        _megabytes(cost),
        *texts,
        "",
        "",
        _dense_score(row),
        *(find(cost, None) for find in _COST.values()),
    ]


def _dense_score(row: Facts) -> str:
    tasks = [each["dense"] for each in _compared(row)]
    return f"{sum(tasks) / len(tasks):.1%}" if tasks else "–"


def _row(row: Facts, facts: Facts) -> list[str]:
    quality, (base, cost) = row["quality"], row["cost"]
    found = [each["divergence"] for each in quality if each["divergence"]]
    kl = f"{sum(each['kl']['mean'] for each in found) / len(found):.4f}" if found else "–"
    same = f"{sum(each['same_top']['mean'] for each in found) / len(found):.1%}" if found else "–"
    return [
        f"`{row['preset']}`",
        row["runner"],
        _megabytes(cost),
        *(_perplexity(each) for each in quality),
        kl,
        same,
        _score(_compared(row)),
        *(find(cost, base) for find in _COST.values()),
    ]


def _perplexity(found: Facts) -> str:
    error = "" if found["ratio_error"] is None else f" ± {found['ratio_error']:.3f}"
    return f"{found['compressed']:.2f}, ×{found['compressed'] / found['dense']:.3f}{error}"


def _score(found: list[Facts]) -> str:
    """Mean over tasks; their documents are independent, so the variances of the changes add up."""
    if not found:
        return "–"
    count = len(found)
    errors = [each["change"]["standard_error"] for each in found]
    change = sum(each["change"]["mean"] for each in found) / count
    score = f"{sum(each['compressed'] for each in found) / count:.1%}, {change:+.1%}"
    if any(error is None for error in errors):
        return score
    return f"{score} ± {Z_95 * sqrt(sum(error**2 for error in errors)) / count:.1%}"


def _megabytes(cost: Facts) -> str:
    size = cost["bytes_on_disk"]
    return "–" if size is None else f"{size / 1e6:.{0 if size > 1e7 else 2}f}"


def _rate(cost: Facts, base: Facts | None, name: str) -> str:
    median = cost["speed"][name]["median"]
    if base is None:
        return f"{median:.1f}"
    turns = zip(cost["speed"][name]["turns"], base["speed"][name]["turns"], strict=True)
    ratios = sorted(ours / theirs for ours, theirs in turns)
    return f"{median:.1f}, ×{ratios[len(ratios) // 2]:.2f}"


def _peak(cost: Facts, base: Facts | None) -> str:
    running: Any = cost["memory"]["running"]
    return "unavailable" if running is None else f"{running / 1e6:.0f}"


def _joules(cost: Facts, base: Facts | None) -> str:
    found: Any = cost["energy"]["decode_joules_per_token"]
    return "unavailable" if found is None else f"{found:.3f}"


_COST = {
    "prefill tokens/s": lambda cost, base: _rate(cost, base, "prefill"),
    "decode tokens/s": lambda cost, base: _rate(cost, base, "decode"),
    "peak MB": _peak,
    "J/token": _joules,
}
"""Columns of what a model costs."""
