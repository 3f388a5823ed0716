"""Tables of latency: whole models of plans beside the sums of their parts. Standard library only."""

from __future__ import annotations

from statistics import median

from tables.cells import Facts, markdown

_HOW = {
    "microbenchmarks": "products measured alone, the rest of blocks as differences of small models",
    "differences": "everything as differences of small models",
}


def latency(facts: Facts) -> str:
    """One table for each runtime whose plans were measured."""
    return "\n\n".join(_table(table) for table in facts["tables"] if table["checks"])


def _table(table: Facts) -> str:
    rows = [
        [check["model"], *_phase(check, "prefill"), *_phase(check, "decode"), f"{check['spread']:.0%}"]
        for check in table["checks"]
    ]
    errors = {
        phase: [abs(check["summed"][phase] / check["measured"][phase] - 1) for check in table["checks"]]
        for phase in ("prefill", "decode")
    }
    worst = ", ".join(f"{phase} {median(found):.1%} (largest {max(found):.1%})" for phase, found in errors.items())
    clock = "processor time" if table["clock"] == "processor" else "wall time"
    head = (
        f"**{table['runtime']}**: {_HOW[table['by']]}; {clock}, threads: {table['threads']}, batch: {table['batch']}, "
        f"prompt: {table['context']} tokens, medians of {table['turns']} turns. Median error of the sums: {worst}. "
        "Models have random weights."
    )
    header = ["plan", "prefill, summed", "measured", "error", "decode step, summed", "measured", "error", "spread"]
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    load = f"; processes that wanted the processor: {table['load']:.1f}" if table["load"] is not None else ""
    return "\n\n".join([head, markdown(header, rows), f"<sub>{versions}; {table['processor']}{load}</sub>"])


def _phase(check: Facts, phase: str) -> list[str]:
    summed, measured = check["summed"][phase], check["measured"][phase]
    return [f"{1e3 * summed:.1f} ms", f"{1e3 * measured:.1f} ms", f"{summed / measured - 1:+.1%}"]
