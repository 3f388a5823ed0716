"""Tables of the real model: one for docs/results.md with everything, one of a few lines for the README."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from tables.cells import Facts, environment, markdown, protocol
from tables.paired import Method, between_draws, chosen, difference, methods, on_common_draws, ratio

MODEL = "SmolLM2-135M-Instruct"
"""The one in the README."""

FEWER_BITS = ("int4_g64", "int3_g64", "int2_g64")
"""Settings that come first, and that the README shows."""

COLUMNS = (
    "Perplexity: mean (lowest–highest) over calibration draws, × dense ± standard error over windows. KL: from the "
    "dense model, nats per token over all texts. Loss − ours: nats per token over all texts, minus those of the row in "
    "bold, ± standard error of the paired difference, in the draws that both have (lowest to highest of them); in bold "
    "is the best of ours on validation texts. MB: codes without padding, their scales, all else in 16 bits; the token "
    "embedding is 57 MB of that unless a row rounds it."
)


def everything(facts: Facts) -> str:
    """One table for each setting: ours and the peers' side by side."""
    rows = methods(facts)
    measured = [each for each in dict.fromkeys(row.setting for row in rows) if each != "dense"]
    settings = [each for each in FEWER_BITS if each in measured] + [each for each in measured if each not in FEWER_BITS]
    parts = [about(facts, rows)]
    for setting in settings:
        best = chosen(rows, setting, facts)
        body = [line(row, rows, facts, best) for row in rows if row.setting == setting]
        header = ["", setting, "MB", *facts["protocol"]["texts"], "KL", "loss − ours", "CPU s", "peak MB", "draws"]
        parts.append(markdown(header, body))
    return "\n\n".join([*parts, notes(facts), environment(facts)])


def about(facts: Facts, rows: Sequence[Method]) -> str:
    """What was measured, on what, calibrated how."""
    told, dense = facts["protocol"], dense_of(rows)
    texts = ", ".join(
        f"{mean(dense.perplexities(text, facts['tokens'][text])):.2f} on {text} ({sum(facts['tokens'][text]):,} tokens)"
        for text in told["texts"]
    )
    return (
        f"**{facts['model']}**: dense perplexity {texts}; {protocol(told['window'], told['bos'])}. Calibrated on "
        f"{told['samples']} × {told['tokens']} tokens of {calibration(facts)}, the same for every tool. {COLUMNS}"
    )


def calibration(facts: Facts) -> str:
    """What the calibration text is called."""
    return str(facts.get("calibration", "WikiText-2 valid"))


def line(row: Method, rows: Sequence[Method], facts: Facts, best: Method | None) -> list[str]:
    """One row of a table."""
    dense, texts = dense_of(rows), facts["protocol"]["texts"]
    against = "–"
    if best is not None and row != best:
        apart = difference(*on_common_draws(row, best), facts, texts)
        drawn = between_draws(row, best, facts, texts)
        between = f" ({min(drawn):+.3f} to {max(drawn):+.3f})" if len(drawn) > 1 else ""
        against = f"{apart.mean:+.3f} ± {apart.error:.3f}{between}"
    kl = difference(row, dense, facts, texts, "kl")
    peaks = [trial["peak_bytes"] for trial in row.trials if trial["peak_bytes"]]
    name = f"**{row.name}**" if row == best else row.name
    return [
        row.who,
        name,
        f"{row.trials[0]['bytes'] / 1e6:.0f}",
        *(perplexity(row, dense, facts, text) for text in texts),
        f"{kl.mean:.3f} ± {kl.error:.3f}",
        against,
        f"{mean(trial['cpu_seconds'] for trial in row.trials):.0f}",
        f"{max(peaks) / 1e6:,.0f}" if peaks else "–",
        str(len(row.trials)),
    ]


def perplexity(row: Method, dense: Method, facts: Facts, text: str) -> str:
    """Mean, range over the draws, ratio to dense with its error."""
    found = row.perplexities(text, facts["tokens"][text])
    apart = ratio(row, dense, facts, [text])
    between = f" ({min(found):.2f}–{max(found):.2f})" if len(found) > 1 else ""
    return f"{mean(found):.2f}{between}, ×{apart.mean:.3f} ± {apart.error:.3f}"


def notes(facts: Facts) -> str:
    """Versions of the peers, and which code was measured."""
    peers = {trial["who"]: trial["versions"] for trial in facts["trials"] if "versions" in trial}
    names = {"llm-compressor": "llmcompressor"}
    told = [f"{who} {versions.get(names.get(who, who), '')}".strip() for who, versions in sorted(peers.items())]
    commits = sorted({trial["commit"] for trial in facts["trials"]})
    return f"Peers: {', '.join(told) or 'none'}. Measured at commit {', '.join(commits)}."


def short(facts: Facts) -> str:
    """Bits by method: ours as chosen on validation text, and the best that every peer reached."""
    rows = methods(facts)
    dense, texts = dense_of(rows), facts["protocol"]["texts"]
    draws = 1
    body = [["dense", "", size(dense), *(f"{mean(dense.perplexities(t, facts['tokens'][t])):.2f}" for t in texts), ""]]
    for setting in FEWER_BITS:
        best = chosen(rows, setting, facts)
        if best is None:
            continue
        peers = [row for row in rows if row.setting == setting and row.who != "ours"]
        lowest = {row.who: row for row in sorted(peers, key=lambda r: -difference(r, dense, facts, texts).mean)}
        for row in (best, *sorted(lowest.values(), key=lambda r: r.who)):
            name = f"**{row.name}**" if row is best else f"{row.who}: {row.name}"
            kl = difference(row, dense, facts, texts, "kl")
            draws = max(draws, len(row.trials))
            body.append(
                [f"`{setting}`", name, size(row), *(one_text(row, dense, facts, t) for t in texts), f"{kl.mean:.3f}"]
            )
    told = facts["protocol"]
    many = "One calibration draw" if draws == 1 else f"Means of up to {draws} calibration draws"
    head = (
        f"{facts['model']}: perplexity ({protocol(told['window'], told['bos'])}), × dense ± standard error. All tools "
        f"calibrate on the same {told['samples']} × {told['tokens']} tokens of {calibration(facts)}; ours (in bold) "
        f"was chosen on validation text. {many}; docs/results.md has all rows."
    )
    return "\n\n".join([head, markdown(["weights", "by", "MB", *texts, "KL"], body), environment(facts)])


def size(row: Method) -> str:
    """Megabytes."""
    return f"{row.trials[0]['bytes'] / 1e6:.0f}"


def one_text(row: Method, dense: Method, facts: Facts, text: str) -> str:
    """Ratio to dense."""
    apart = ratio(row, dense, facts, [text])
    return f"{mean(row.perplexities(text, facts['tokens'][text])):.2f}, ×{apart.mean:.2f} ± {apart.error:.2f}"


def dense_of(rows: Sequence[Method]) -> Method:
    """The model as it was."""
    return next(row for row in rows if row.setting == "dense")
