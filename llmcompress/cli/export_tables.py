"""Tables of exports: what was written and found when it was read back, and which target holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from llmcompress.exporters.targets import TargetAnswer
from llmcompress.records.export_report import ExportReport


def export_table(made: Mapping[str, ExportReport]) -> Table:
    """A row per target; the last columns are empty where it was not run."""
    table = Table(box=None, pad_edge=False)
    for title in (
        "target",
        "MB",
        "codes read back",
        "differing",
        "perplexity",
        "runtime ÷ PyTorch",
        "same top",
        "decode tok/s",
        "× transformers float32",
    ):
        table.add_column(title, justify="left" if title == "target" else "right")
    for name, report in made.items():
        codes = sum(row.values for row in report.read_back if row.codes_differing is not None)
        run = report.runtime
        ran = (
            [
                f"{run.perplexity_runtime:.3f}",
                f"{run.perplexity_runtime / run.perplexity_model:.4f}",
                f"{run.same_top:.1%}",
                f"{run.decode_tokens_per_second:.1f}",
                f"{run.decode_to_dense:.2f}" if run.decode_to_dense is not None else "",
            ]
            if run
            else [""] * 5
        )
        table.add_row(name, f"{report.bytes / 1e6:.1f}", f"{codes:,}", str(len(report.differing)), *ran)
    return table


def targets_table(found: Sequence[TargetAnswer]) -> Table:
    """Which targets hold a scheme exactly, converted or not at all; in brackets the nearest that they hold."""
    table = Table(box=None, pad_edge=False)
    for title in ("scheme", "answer", "targets"):
        table.add_column(title)
    for scheme in dict.fromkeys(row.scheme for row in found):
        label = scheme
        for answer in ("exact", "converted", "refused"):
            named = [_named(row) for row in found if (row.scheme, row.answer) == (scheme, answer)]
            if named:
                table.add_row(label, answer, ", ".join(named))
                label = ""
    return table


def _named(row: TargetAnswer) -> str:
    """With a space that does not end a line."""
    return f"{row.target}\N{NO-BREAK SPACE}({row.nearest})" if row.answer == "refused" and row.nearest else row.target
