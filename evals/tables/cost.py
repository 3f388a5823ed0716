"""Tables of seconds, bytes and tokens per second."""

from __future__ import annotations

from statistics import mean

from tables.cells import Facts, environment, markdown, protocol


def seconds(facts: Facts) -> str:
    """CPU time in plain forward passes, ours and the peer's, and how ours grows."""

    def shown(values: list[float]) -> str:
        return f"{mean(values):.2f}" + (f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else "")

    rows = [
        [
            row["method"],
            f"{row['samples']} × {facts['tokens']}",
            *(shown(row[who]) if row[who] else "–" for who in ("ours", "peer")),
        ]
        for row in facts["rows"]
    ]
    head = (
        f"CPU time of one thread ÷ that of a plain float32 forward pass over the same tokens at the same time, on a "
        f"Llama of {facts['parameters'] / 1e6:.0f} M random weights; mapping, loading and saving left out; mean "
        "(lowest–highest) where there are several runs. `perplexity` is measuring itself, logits and loss."
    )
    peer = f"llm-compressor {facts.get('peer_versions', {}).get('llmcompressor', '')}".rstrip()
    tables = [markdown(["method", "tokens", "ours", peer], rows), *_per_sample(facts, peer)]
    if facts["growth"]:
        growing = [
            [row["method"], row["by"], ", ".join(map(str, row["values"])), f"{row['exponent']:.2f}"]
            for row in facts["growth"]
        ]
        tables.append(markdown(["method", "grows with", "values", "exponent"], growing))
    return "\n\n".join([head, *tables, environment(facts)])


def _per_sample(facts: Facts, peer: str) -> list[str]:
    """What one more calibration sample costs, in forward passes over that sample."""
    found = []
    for method in dict.fromkeys(row["method"] for row in facts["rows"]):
        few, *more = sorted((row for row in facts["rows"] if row["method"] == method), key=lambda row: row["samples"])
        for many in more:
            sides = []
            for who in ("ours", "peer"):
                passes = [mean(row[who]) * row["samples"] for row in (few, many) if row[who]]
                added = many["samples"] - few["samples"]
                sides.append(f"{(passes[1] - passes[0]) / added:.2f}" if len(passes) == 2 else "–")
            found.append([method, f"{few['samples']} → {many['samples']}", *sides])
    return [markdown(["each added sample", "samples", "ours", peer], found)] if found else []


def memory(facts: Facts) -> str:
    """Peak resident memory, and the dry run's estimate."""
    rows = [
        [
            str(row["blocks"]),
            row["offload"],
            f"{row['bytes_model'] / 1e6:,.0f} MB",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['estimated_bytes'] / 1e6:,.0f} MB",
        ]
        for row in facts["rows"]
    ]
    head = (
        f"**{facts['shape']}**, random weights in float16, gptq `{facts['scheme']}`, {facts['samples']} × "
        f"{facts['tokens']} calibration tokens, one process."
    )
    header = ["blocks", "--offload", "weights on disk", "peak resident", "estimated"]
    return "\n\n".join([head, markdown(header, rows), environment(facts)])


def map_time(facts: Facts) -> str:
    """Seconds to map one block."""
    rows = [[row["shape"], f"{row['seconds']:.1f}", str(row["sites"]), str(row["folds"])] for row in facts["rows"]]
    return markdown(["width / feed-forward", "seconds", "sites", "folds"], rows) + "\n\n" + environment(facts)


def _shares(row: Facts) -> list[str]:
    """Of the blocks that ran and of the inputs that were computed with."""
    return [f"{100 * row['depth']:.0f} %", f"{100 * row.get('active', 1.0):.0f} %"]


def _rates(row: Facts) -> list[str]:
    """Tokens per second of decode and prefill, as ratios to dense."""
    return [f"×{row['decode_ratio']:.2f}", f"×{row['prefill_ratio']:.2f}"]


def dynamic_speed(facts: Facts) -> str:
    """Ratios to the dense model beside the shares that the timed decode really had."""
    rows = [[row["method"], *_shares(row), *_rates(row)] for row in facts["rows"]]
    head = (
        f"**{facts['shape']}**, random weights, float32, {facts['threads']} thread(s), batch 1 ({facts['clock']} time)."
    )
    header = ["method", "blocks run", "inputs used", "decode", "prefill"]
    return "\n\n".join([head, markdown(header, rows), environment(facts)])


def dynamic(facts: Facts) -> str:
    """Mean fraction of blocks and of inputs used, and the cost."""
    if "text" not in facts:
        return ""
    dense = next(row["perplexity"] for row in facts["rows"] if row["method"] == "dense")
    rows = [
        [
            row["method"],
            f"{row['perplexity']:.2f}, ×{row['perplexity'] / dense:.3f}",
            *_shares(row),
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
            *_rates(row),
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


def repeated_speed(facts: Facts) -> str:
    """Medians of two runs, and what they may claim."""
    rows = [
        [
            row["model"],
            row["phase"],
            " and ".join(f"{median:.1f}" for median in row["medians"]),
            f"{100 * row['difference']:.1f} %",
            " and ".join(f"{100 * spread:.0f} %" for spread in row["spreads"]),
        ]
        for row in facts["rows"]
    ]
    others = " and ".join(f"{100 * share:.0f} %" for share in facts["used_by_others"])
    claim = f"the claim of {100 * facts['claim']:.0f} % "
    claim += "is about an idle machine" if facts["holds"] is None else "holds" if facts["holds"] else "does not hold"
    head = (
        f"Median of {facts['repeats']} turns of {facts['new_tokens']} tokens, {facts['rows'][0]['threads']} thread(s), "
        f"{facts['clock']} time. Other programs used {others} of the cores just before: {claim}."
    )
    header = ["model", "", "tokens/s", "difference", "spread of the turns"]
    return "\n\n".join([head, markdown(header, rows), environment(facts)])
