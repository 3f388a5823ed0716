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
    "of it graph, tokenizer",
    "tensors ÷ formula",
    "prefill",
    "decode",
    "× transformers",
    "÷ own",
]
_SHAPES = ["parameters", "", "MB", "prefill", "decode", "× transformers", "÷ own"]


def exports(facts: Facts) -> str:
    """A row per target, and below each what its own tools make of the dense model."""
    rows = facts["rows"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    ordered = sorted(rows, key=lambda row: (targets.index(row["target"]), bool(row.get("own"))))
    body = [_dense(facts), *map(_row, ordered)]
    return "\n\n".join([_about(facts), markdown(_HEADER, body), environment(facts)])


def _about(facts: Facts) -> str:
    speed = facts["speed"]
    return (
        f"**{facts['model']}**: {facts['windows']} windows of {facts['text']} ({protocol(facts['window'], False)}); "
        "`code` names are our targets, all with the same codes; below each stands the same runtime with its own "
        "rounding of the dense model. ÷ PyTorch: the runtime's perplexity ÷ that of the same compressed model in "
        "PyTorch, paired by window; KL to it in nats per token. "
        f"{_timed(speed)} This checkpoint was dequantized from an "
        "asymmetric 4-bit grid in groups of 32, which is Q4_K's: that row is better here than it would be elsewhere."
    )


def shapes(facts: Facts) -> str:
    """Random models: a row per target, and below each what its own tools make of the same dense model."""
    rows = facts["rows"]
    places = {(row["shape"], row.get("target")): place for place, row in enumerate(rows) if not row.get("own")}
    ordered = sorted(rows, key=lambda row: (places[row["shape"], row.get("target")], bool(row.get("own"))))
    body = [[f"{row['parameters'] / 1e6:.0f} M", _name(row), _megabytes(row), *_speed(row)] for row in ordered]
    about = f"Random weights, int4 by rounding in groups of 64, tables in 8 bits. {_timed(facts['speed'])}"
    return "\n\n".join([about, markdown(_SHAPES, body), environment(facts)])


def _timed(speed: Facts) -> str:
    return (
        f"Tokens/s of {speed['clock']} time: prompt of {speed['prompt']}, {speed['new']} new, medians of "
        f"{speed['turns']} turns, one thread; × transformers: decoding ÷ that of transformers with the dense model in "
        "float32; ÷ own: decoding ÷ that of the runtime's own int4 in the same turn, ± half of what the quartiles span."
    )


def _dense(facts: Facts) -> list[str]:
    cost = facts["reference"]
    empty = [""] * 2
    numbers = [f"{facts['dense_perplexity']:.3f}", *[""] * 6]
    return ["dense, transformers float32", *empty, *numbers, *_speed(cost)]


def _row(row: Facts) -> list[str]:
    differing = f"{row['codes_differing']:,} of {row['codes']:,}" if "codes" in row else ""
    logits = f"{row['largest_logit_difference']:.2g} / {row['mean_logit_difference']:.2g}" if "kl" in row else ""
    perplexity = f"{row['perplexity']:.3f}" if "perplexity" in row else "not run"
    return [
        _name(row),
        differing,
        logits,
        perplexity,
        _ratio(row, "ratio_to_torch", "ratio_standard_error"),
        _ratio(row, "ratio_to_dense", "dense_standard_error"),
        f"{max(row['kl'], 0.0):.4f}" if "kl" in row else "",
        _megabytes(row),
        f"{row['description_bytes'] / 1e6:.1f}" if "description_bytes" in row else "",
        f"{(row['bytes'] - row['description_bytes']) / row['formula_bytes']:.3f}" if "formula_bytes" in row else "",
        *_speed(row),
    ]


def _name(row: Facts) -> str:
    code, comma, setting = row["name"].partition(",")
    return row["name"] if row.get("own") or "target" not in row else f"`{code}`{comma}{setting}"


def _megabytes(row: Facts) -> str:
    return f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""


def _speed(row: Facts) -> list[str]:
    return [
        f"{row['prefill']:.0f}" if "prefill" in row else "",
        f"{row['decode']:.1f}" if "decode" in row else "",
        f"{row['decode_to_transformers']:.2f}" if "decode_to_transformers" in row else "",
        f"{row['decode_to_own']:.3f} ± {row['decode_to_own_spread']:.3f}" if "decode_to_own" in row else "",
    ]


def _ratio(row: Facts, name: str, error: str) -> str:
    return f"{row[name]:.4f} ± {row[error]:.4f}" if name in row else ""
