"""The table of export targets. Standard library only."""

from __future__ import annotations

from tables.cells import Facts, environment, markdown, protocol

_HEADER = [
    "",
    "codes differing",
    "logits: max / mean",
    "perplexity",
    "÷ PyTorch ± s. e.",
    "÷ dense ± s. e.",
    "KL",
    "MB",
    "÷ formula",
    "prefill",
    "decode",
    "× transformers",
]


def exports(facts: Facts) -> str:
    """A row per target, and below each what its own tools make of the dense model."""
    rows = facts["rows"]
    ordered = [row for row in rows if not row.get("own")]
    body = [_dense(facts)]
    for row in ordered:
        body += [_row(row), *(_row(other) for other in rows if other.get("own") and other["target"] == row["target"])]
    return "\n\n".join([_about(facts), markdown(_HEADER, body), environment(facts)])


def _about(facts: Facts) -> str:
    speed = facts["speed"]
    return (
        f"**{facts['model']}**: {facts['windows']} windows of {facts['text']} ({protocol(facts['window'], False)}); "
        "`code` names are our targets, all with the same codes; below each stands the same runtime with its own "
        "rounding of the dense model. ÷ PyTorch: the runtime's perplexity ÷ that of the same compressed model in "
        "PyTorch, paired by window; KL to it in nats per token. Tokens/s: prompt of "
        f"{speed['prompt']}, {speed['new']} new, median of {speed['turns']} turns, one thread; × transformers: "
        "decoding ÷ that of transformers with the dense model in float32. This checkpoint was dequantized from an "
        "asymmetric 4-bit grid in groups of 32, which is Q4_K's: that row is better here than it would be elsewhere."
    )


def _dense(facts: Facts) -> list[str]:
    cost = facts["reference"]
    empty = [""] * 2
    numbers = [f"{facts['dense_perplexity']:.3f}", "", "", "", "", ""]
    return ["dense, transformers float32", *empty, *numbers, f"{cost['prefill']:.0f}", f"{cost['decode']:.1f}", "1"]


def _row(row: Facts) -> list[str]:
    name = row["name"] if row.get("own") else f"`{row['name']}`"
    differing = f"{row['codes_differing']:,} of {row['codes']:,}" if "codes" in row else ""
    logits = f"{row['largest_logit_difference']:.2g} / {row['mean_logit_difference']:.2g}" if "kl" in row else ""
    perplexity = f"{row['perplexity']:.3f}" if "perplexity" in row else "not run"
    return [
        name,
        differing,
        logits,
        perplexity,
        _ratio(row, "ratio_to_torch", "ratio_standard_error"),
        _ratio(row, "ratio_to_dense", "dense_standard_error"),
        f"{row['kl']:.4f}" if "kl" in row else "",
        f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
        f"{row['bytes'] / row['formula_bytes']:.3f}" if "formula_bytes" in row else "",
        f"{row['prefill']:.0f}" if "prefill" in row else "",
        f"{row['decode']:.1f}" if "decode" in row else "",
        f"{row['decode_to_transformers']:.2f}" if "decode_to_transformers" in row else "",
    ]


def _ratio(row: Facts, name: str, error: str) -> str:
    return f"{row[name]:.4f} ± {row[error]:.4f}" if name in row else ""
