"""Speed, memory, bytes read and energy as tables of at most 80 columns, for models with short names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from llmcompress.cli.tables import plain_table
from llmcompress.report.forms import size

if TYPE_CHECKING:
    from llmcompress.evaluation.device.cost import CostTable
    from llmcompress.records.cost import Cost, MachineLimits, Rate, RateRatio


def cost_tables(table: CostTable, reference: str) -> list[RenderableType]:
    """Every kind of cost in a table of its own; ratios to the reference with the lowest and highest of all turns."""
    rows = table.rows
    tables: list[RenderableType] = [_heading(rows[0], table.limits), _speed(rows)]
    if ratios := table.ratios(reference):
        cells = [(row, (_times(prefill), _times(decode))) for row, prefill, decode in ratios]
        tables.append(_table(cells, ("#prefill", "#decode"), title=f"times as fast as {reference}"))
    for part in (_memory, _traffic, _energy):
        tables += part(rows)
    return tables


def _heading(first: Cost, limits: Iterable[MachineLimits]) -> Text:
    where = "not pinned" if first.cores is None else f"on cores {', '.join(map(str, first.cores))}"
    lines = [
        f"{first.device}, {first.dtype}, {first.threads} threads, {where}",
        f"{first.new_tokens} new tokens, median of {len(first.speed.decode.turns)} turns ± half the spread",
    ]
    lines += [
        f"this machine: {each.bytes_per_second / 1e9:.1f} GB/s of memory, "
        f"{each.flops_per_second / 1e9:.0f} GFLOP/s in {each.dtype}"
        for each in limits
    ]
    return Text("\n".join(lines), style="bold")


def _speed(rows: Sequence[Cost]) -> RenderableType:
    cells = [
        (
            row,
            (
                _rate(row.speed.prefill),
                _rate(row.speed.decode),
                f"{row.speed.seconds_to_first_token * 1000:.0f} ms",
            ),
        )
        for row in rows
    ]
    unit = "tokens per second" if rows[0].speed.clock == "wall" else "tokens per CPU second"
    return _table(cells, ("#prefill", "#decode", "#first token"), title=unit)


def _memory(rows: Sequence[Cost]) -> list[RenderableType]:
    cells = [
        (
            row,
            (
                _size(row.bytes_on_disk),
                _size(row.memory.libraries),
                _size(row.memory.loading),
                _size(row.memory.running),
            ),
        )
        for row in rows
    ]
    table = _table(cells, ("#on disk", "#libraries", "#loading", "#running"), title="peak memory of a fresh process")
    return [table, *_reasons("peak memory", rows, lambda row: row.memory.unavailable)]


def _traffic(rows: Sequence[Cost]) -> list[RenderableType]:
    cells = [
        (
            row,
            (
                _size(row.traffic.weight_bytes),
                _size(row.traffic.cache_bytes),
                _percent(row.traffic.bandwidth_fraction),
                _percent(row.traffic.matrix_rate_fraction),
            ),
        )
        for row in rows
        if row.traffic
    ]
    headings = ("#weights", "#KV cache", "#of GB/s", "#of GFLOP/s")
    return [_table(cells, headings, title="read per decode step, and the limits reached")] if cells else []


def _energy(rows: Sequence[Cost]) -> list[RenderableType]:
    cells = [
        (
            row,
            (
                _number(row.energy.prefill_joules_per_token),
                _number(row.energy.decode_joules_per_token),
                f"{sum(row.energy.idle_watts) / 2:.1f} W",
            ),
        )
        for row in rows
        if row.energy.idle_watts
    ]
    reasons = _reasons("energy", rows, lambda row: row.energy.unavailable)
    if not cells:
        return reasons
    instrument = next(row.energy.instrument for row in rows if row.energy.idle_watts)
    headings = ("#prefill", "#decode", "#idle")
    return [_table(cells, headings, title=f"joules per token above idle ({instrument})"), *reasons]


def _reasons(what: str, rows: Sequence[Cost], reason: Callable[[Cost], str | None]) -> list[RenderableType]:
    found = dict.fromkeys(filter(None, map(reason, rows)))
    return [Text(f"{what}: unavailable ({each})") for each in found]


def _table(cells: Sequence[tuple[Cost, Sequence[str]]], headings: Sequence[str], *, title: str = "") -> RenderableType:
    """A row per model and setting; batch size and context are shown where they vary."""
    shown = len({row.setting for row, _ in cells}) > 1 or any(row.setting != (1, 128) for row, _ in cells)
    setting = ("#batch", "#context") if shown else ()
    rows = [(row.model, *(map(str, row.setting) if shown else ()), *values) for row, values in cells]
    return plain_table(("", *setting, *headings), rows, title=title)


def _rate(rate: Rate) -> str:
    return f"{rate.median:.1f} ±{rate.spread / 2:.0%}"


def _times(ratio: RateRatio) -> str:
    return f"{ratio.median:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f})"


def _size(count: int | None) -> str:
    return "–" if count is None else size(count)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _number(joules: float | None) -> str:
    return "–" if joules is None else f"{joules:.3g}"
