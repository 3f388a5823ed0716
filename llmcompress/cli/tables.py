"""Results as tables for people: report, plan, perplexity, model map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmcompress.records.degraded import degraded_warnings
from llmcompress.report.forms import duration, size

if TYPE_CHECKING:
    from llmcompress.evaluation.footprint import Footprint
    from llmcompress.records.measurements import Divergence, Estimate, PerplexityResult
    from llmcompress.records.report import Report

WORST_SITES = 5
ROWS_SHOWN = 40


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> Table:
    """A table without lines; headings that begin with `#` are numbers, aligned right; all empty, they are not shown."""
    shown = any(heading.strip("#") for heading in headings)
    table = Table(box=None, title=title or None, title_justify="left", pad_edge=False, show_header=shown)
    table.title_style, table.header_style = "bold", "dim"
    for heading in headings:
        numeric = heading.startswith("#")
        table.add_column(heading.removeprefix("#"), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def report_tables(report: Report) -> list[RenderableType]:
    """Quality and bytes before and after, the worst sites, what was degraded or refused."""
    tables: list[RenderableType] = [_quality_table(report)]
    divergences = [each.divergence for each in report.quality if each.divergence]
    if divergences:
        tables.append(_divergence_table(divergences))
    if any(each.dense.from_cache for each in report.quality):
        tables.append(Text("dense scores: from the cache of an earlier run"))
    tables.append(_bytes_line(report))
    if any(row.error is not None for row in report.sites):
        tables.append(_worst_sites(report))
    caches = [(row.cache_bytes_before, row.cache_bytes) for row in report.sites if row.cache_bytes is not None]
    if caches:
        before, after = sum(each[0] or 0 for each in caches), sum(each[1] or 0 for each in caches)
        tables.append(Text(f"key-value cache {before:,} → {after:,} bytes per token ({after / before:.2f} of it)"))
    if report.refused:
        tables.append(_reasons(f"not compressed: {len(report.refused)}", report.refused))
    warnings = dict.fromkeys([*report.warnings, *degraded_warnings(report.sites)])
    tables += [Text(f"warning: {warning}", style="yellow") for warning in warnings]
    tables.append(Text(", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds.items())))
    return tables


def plan_tables(plan: dict[str, Any]) -> list[RenderableType]:
    """What a run would do: every kind of site once, then bytes, memory, time, warnings."""
    sites: list[dict[str, Any]] = plan["sites"]
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for site in sites:
        kind = (_kind(site["site"]), ", ".join(site["passes"]), site["scheme"] or "dense")
        kinds.setdefault(kind, []).append(site)
    rows = [
        (*kind, str(len(same)), f"{same[0]['bits_per_weight']:.2f}", size(sum(site["bytes"] for site in same)))
        for kind, same in kinds.items()
    ]
    headings = ("site", "passes", "scheme", "#count", "#bits per weight", "#bytes")
    tables: list[RenderableType] = [plain_table(headings, rows, title=f"{plan['model']} ({plan['family']})")]
    if plan["refused"]:
        tables.append(_reasons(f"not compressed: {len(plan['refused'])}", plan["refused"]))
    evaluating = plan.get("evaluation_seconds")
    facts = [
        ("weight files", f"{size(plan['bytes_dense'])} → {size(plan['output_bytes'])}"),
        ("peak memory", size(plan["peak_memory_bytes"]) + (", weights on disk" if plan.get("offloaded") else "")),
        (
            "time",
            f"about {duration(plan['estimated_seconds'])}" if plan["estimated_seconds"] is not None else "unknown",
        ),
        ("the time is", _found_by(plan.get("probed_blocks"))),
        ("and to evaluate", f"about {duration(evaluating)}" if evaluating is not None else "unknown"),
    ]
    tables.append(plain_table(("", "#"), facts, title="estimate"))
    tables.append(Text(f"license of the model: {plan['license']}"))
    tables += [Text(f"publishes to {name}: this login may write there") for name in plan.get("publishes") or ()]
    tables += [Text(f"warning: {warning}", style="yellow") for warning in plan["warnings"]]
    return tables


def _found_by(blocks: Sequence[int] | None) -> str:
    """How the seconds of a plan were estimated."""
    return f"measured on {len(blocks)} of its blocks" if blocks else "counted, within a factor of two (--probe: closer)"


def footprint_tables(found: Sequence[Footprint], compared: dict[str, float] | None) -> list[RenderableType]:
    """One column per model, and the ratio of two; what no file stores in a table of its own."""
    ratio = ("",) if compared is None else ("", "#ratio")
    names = [f"#{each.model}" for each in found]
    facts: list[tuple[str, ...]] = [("format", *(each.format for each in found))]
    for name in ("parameters", "embedding", "head", "blocks", "other", "nonzero"):
        facts.append((name.replace("nonzero", "not zero"), *(f"{getattr(each, name):,}" for each in found)))
    for name, label in (("bytes_on_disk", "weight files"), ("ideal_bytes", "bytes without padding or headers")):
        facts.append((label, *(size(getattr(each, name)) for each in found)))
    facts.append(("bits per weight, on disk", *(f"{each.stored_bits_per_weight:.3f}" for each in found)))
    keys = [None, "parameters", None, None, "blocks", None, "nonzero", "bytes_on_disk", "ideal_bytes", None]
    if compared is not None:
        cells = (f"{compared[key]:.3f}" if key in compared else "" for key in keys)
        facts = [(*row, cell) for row, cell in zip(facts, cells, strict=True)]
    if any(each.cache_bytes_per_token for each in found):
        caches = [each.cache_bytes_per_token for each in found]
        shown = ("not in codes" if count is None else f"{count:,}" for count in caches)
        facts.append(("bytes of the key-value cache per token", *shown, *([""] if compared is not None else [])))
    theory: list[tuple[str, ...]] = [
        ("non-zeros and a bit per place", *(size(each.sparse_ideal_bytes) for each in found)),
        ("entropy, bits per code", *(_number(each.entropy_bits_per_code) for each in found)),
        ("Huffman's code, bits per code", *(_number(each.huffman_bits_per_code) for each in found)),
    ]
    title = "in theory: no file here is stored so"
    return [plain_table(("", *names, *ratio[1:]), facts), plain_table(("", *names), theory, title=title)]


def map_tables(found: dict[str, Any]) -> list[RenderableType]:
    """The model map as `inspect` returns it: single facts first, then one table per list."""
    facts = [
        (key.replace("_", " "), _cell(value)) for key, value in found.items() if not isinstance(value, list | dict)
    ]
    tables: list[RenderableType] = [plain_table(("", ""), facts, title="model map")]
    for key, value in found.items():
        if isinstance(value, dict) and value:
            tables.append(_reasons(key.replace("_", " "), {name: _cell(each) for name, each in value.items()}))
        elif isinstance(value, list) and value:
            tables += _list_tables(key.replace("_", " "), value)
    return tables


def _list_tables(title: str, items: list[Any]) -> list[RenderableType]:
    """Mappings become rows; lists inside them become tables of their own, below."""
    if not all(isinstance(item, dict) for item in items):
        return [plain_table((title,), [(_cell(item),) for item in items[:ROWS_SHOWN]])]
    keys = list(dict.fromkeys(key for item in items for key in item))
    inner = [key for key in keys if any(_is_table(item.get(key)) for item in items)]
    flat = [key for key in keys if key not in inner]
    shown = [[_cell(item.get(key)) for key in flat] for item in items[:ROWS_SHOWN]]
    more = f" (first {ROWS_SHOWN} of {len(items)})" if len(items) > ROWS_SHOWN else ""
    headings, cells = _with_values([key.replace("_", " ") for key in flat], shown)
    tables: list[RenderableType] = [plain_table(headings, cells, title=title + more)]
    for item in items:
        for key in inner:
            if item.get(key):
                tables += _list_tables(
                    f"{title} {_cell(item[flat[0]]) if flat else ''}: {key.replace('_', ' ')}", item[key]
                )
    return tables


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_cell(each) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _tokens(result: PerplexityResult) -> str:
    """How many were measured, of how many where that is known."""
    whole = result.text_tokens
    # what is given and not predicted is a token of the text: a text measured to its end lacks at most one a window
    partly = whole is not None and whole - result.tokens > whole / result.window + 1
    return f"{result.tokens} of {whole}" if partly else str(result.tokens)


def _worst_sites(report: Report) -> Table:
    """Where most of the output is lost, each site with what the last pass left of it."""
    last = {row.site: row for row in report.sites if row.error is not None}
    worst = sorted(last.values(), key=lambda row: -(row.error or 0))[:WORST_SITES]
    rows = [
        # of pruned sites the baseline is not rounding
        (
            row.site,
            row.algorithm,
            row.scheme or "",
            _percent(row.error),
            _percent(row.error_before if row.scheme else None),
        )
        for row in worst
    ]
    headings = ("site", "by", "scheme", "#output error", "#plain rounding")
    return plain_table(*_with_values(headings, rows), title=f"worst sites of {len(last)}")


def _with_values(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which some row says something."""
    kept = [number for number in range(len(headings)) if any(row[number] for row in rows)]
    return [headings[number] for number in kept], [[row[number] for number in kept] for row in rows]


def _quality_table(report: Report) -> Table:
    rows = [
        (
            each.dense.text,
            f"{each.dense.perplexity:.3f}",
            f"{each.compressed.perplexity:.3f}",
            f"{each.ratio:.3f}" + ("" if each.ratio_error is None else f" ±{each.ratio_error:.3f}"),
            str(each.dense.window),
            _tokens(each.dense),
        )
        for each in report.quality
    ]
    headings = ("perplexity on", "#dense", "#compressed", "#ratio", "#window", "#tokens")
    return plain_table(headings, rows, title=f"{report.model}, recipe {report.recipe_hash}")


def _divergence_table(divergences: Sequence[Divergence]) -> Table:
    """A column per text. Behind ±: one standard error, with windows as the unit that varies.

    KL tells apart the dense model's likely tokens alone, and what probability those have stands beside it.
    """
    rows = [
        ("KL", *(_with_error(each.kl, "{:.4f}") for each in divergences)),
        ("KL, 99 %", *(f"{each.kl_99:.3f}" for each in divergences)),
        ("top-k mass", *(f"{each.top_mass:.1%}" for each in divergences)),
        ("same top token", *(_with_error(each.same_top, "{:.2%}") for each in divergences)),
        ("right → wrong", *(_with_error(each.right_to_wrong, "{:.2%}") for each in divergences)),
        ("wrong → right", *(_with_error(each.wrong_to_right, "{:.2%}") for each in divergences)),
    ]
    return plain_table(("against dense", *(f"#{each.text}" for each in divergences)), rows)


def _with_error(found: Estimate, form: str) -> str:
    error = found.standard_error
    return form.format(found.mean) + ("" if error is None else f" ±{form.format(error)}")


def _bytes_line(report: Report) -> Text:
    before, after = report.bytes_dense, report.bytes_compressed
    ratio = f" ({after / before:.2f} of it)" if before else ""
    weights = [row.bits_per_weight for row in report.sites if row.bits_per_weight is not None]
    mean = f"; {sum(weights) / len(weights):.2f} bits per weight by the scheme, mean over sites" if weights else ""
    return Text(f"weight files {size(before)} → {size(after)}{ratio}{mean}")


def _reasons(title: str, reasons: dict[str, str]) -> Table:
    """Names and reasons; the same place of all blocks for the same reason is one row."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault((_kind(name), reason), []).append(name)
    rows = [(kind if len(same) > 1 else same[0], reason) for (kind, reason), same in kinds.items()]
    if len(rows) > ROWS_SHOWN:
        rows = [*rows[:ROWS_SHOWN], (f"and {len(rows) - ROWS_SHOWN} more", "see --json")]
    return plain_table(("", ""), rows, title=title)


def _kind(site: str) -> str:
    """`model.layers.*.mlp.up_proj`: the same site of all blocks."""
    return ".".join("*" if part.isdecimal() else part for part in site.split("."))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.3%}"


def _bos(result: PerplexityResult) -> str:
    return "yes" if result.bos else "no"
