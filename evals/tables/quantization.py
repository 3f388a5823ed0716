"""Tables of fewer bits."""

from __future__ import annotations

from statistics import mean

from tables.cells import Facts, calibrated, environment, grid, markdown, protocol, spread

METHODS = ("rtn", "rtn, range mse", "gptq", "awq", "awq→gptq")


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
        "All tools get the same tokens; embedding and head stay dense; seconds are CPU seconds of one process. "
        f"{peers}.",
        "`mixed precision` takes as many bytes as the uniform scheme of its column when stored without padding "
        "(`save.format: llmcompress`).",
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


def allocation(facts: Facts) -> str:
    """One table for each part of the program."""
    rows = facts["rows"]
    flat = {**facts, "rows": [row for part in rows.values() for row in part]}
    tables = [grid(facts, part, "setting", name) for name, part in rows.items() if part]
    return "\n\n".join([calibrated(flat), *tables, environment(facts)])


def rotation(facts: Facts) -> str:
    """Recipe by outliers injected; ratios to the dense model, which the outliers leave as it was."""
    dense = next(mean(row["perplexity"]) for row in facts["rows"] if row["method"] == "dense")
    cells = {(row["method"], row["gain"]): row["perplexity"] for row in facts["rows"]}
    gains = list(dict.fromkeys(gain for _, gain in cells))
    methods = dict.fromkeys(method for method, _ in cells)
    body = [[each, *(spread(cells.get((each, gain)), dense) for gain in gains)] for each in methods]
    head = (
        f"**{facts['model']}** on `{facts['text']}` ({protocol(facts['window'], facts['bos'])}); outliers: one channel "
        "of every norm multiplied, the columns that read it divided."
    )
    header = ["recipe", *("as it is" if gain == 1 else f"outliers ×{gain:g}" for gain in gains)]
    return "\n\n".join([head, markdown(header, body), environment(facts)])
