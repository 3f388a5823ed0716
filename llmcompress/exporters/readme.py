"""The README.md of an exported folder: what it is, how to run it, and what was checked."""

from __future__ import annotations

from collections import Counter

from llmcompress.exporters.base import Exporter
from llmcompress.records.export_report import EXPORT_REPORT, ExportReport

README = "README.md"


def readme(report: ExportReport, exporter: Exporter) -> str:
    """Markdown."""
    name = report.model.rstrip("/").rpartition("/")[2]  # of a path, nothing that only this computer knows
    lines = [
        f"# {name}, {report.target}",
        "",
        f"`{name}` as compressed and exported by llmcompress for the target `{report.target}`: "
        f"{report.bytes / 1e6:.1f} MB of weights{_unpacked(report)}{_types(report)}.",
        "",
        "```" + exporter.language,
        exporter.how_to_run,
        "```",
        "",
        *_checked(report),
        *[f"- {note}" for note in report.notes],
    ]
    return "\n".join(lines) + "\n"


def _unpacked(report: ExportReport) -> str:
    """What an archive is once it is loaded."""
    return "" if report.unpacked_bytes is None else f" at rest, {report.unpacked_bytes / 1e6:.1f} MB in memory"


def _types(report: ExportReport) -> str:
    """Share of each type among all numbers."""
    counts: Counter[str] = Counter()
    for row in report.read_back:
        counts[row.stored_as] += row.values
    whole = counts.total()
    shares = [f"{count / whole:.0%} {kind}" for kind, count in counts.most_common() if count > 0.005 * whole]
    return f" ({', '.join(shares)})" if shares else ""


def _checked(report: ExportReport) -> list[str]:
    coded = [row for row in report.read_back if row.codes_differing is not None]
    found = []
    if report.read_back:
        codes = sum(row.values for row in coded)
        found.append(
            f"After writing, {len(report.read_back)} tensors were decoded again: of {codes:,} codes none differs from "
            f"the model's, nor does any scale ({EXPORT_REPORT})."
        )
    proof = report.runtime
    if proof is not None:
        found.append(
            f"{proof.runtime} computes perplexity {proof.perplexity_runtime:.3f} where the model in PyTorch computes "
            f"{proof.perplexity_model:.3f} ({proof.tokens} tokens of {proof.text}, window {proof.window}, no BOS); "
            f"both hold the same token most likely at {proof.same_top:.1%} of the positions."
        )
    if report.not_run is not None:
        found.append(f"It was not run here: {report.not_run}.")
    return [*found, ""] if found else []
