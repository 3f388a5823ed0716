"""The sections of a report on one model: verdict, numbers, layers, text, and how to make the same again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from llmcompress.records.evaluation import Compression, Evaluation
from llmcompress.records.gate import GateResult
from llmcompress.records.inside import Distribution, TokenDivergences
from llmcompress.records.rows import SiteReport
from llmcompress.records.tasks import GenerationComparison
from llmcompress.report import plots
from llmcompress.report.document import Block, Cards, Code, Document, Paragraph, Passage, Plot, Section, Table
from llmcompress.report.forms import share, significant
from llmcompress.report.kinds import lines
from llmcompress.report.lines import Line
from llmcompress.report.verdict import got_worse, verdict

CARDS = (
    "weight files",
    "perplexity",
    "KL from dense, nats per token",
    "same top token",
    "mean score",
    "acc",
    "decode, tokens/s",
    "prefill, tokens/s",
    "peak memory",
    "energy per new token",
)
"""Lines that get a card, in this order; of several texts the first."""

MOST_PAIRS = 20
"""Prompts whose texts are shown."""

WORST_SITES = 8


def document_of(found: Evaluation) -> Document:
    """The report on one model."""
    against = f"against {found.baseline}" if found.baseline else "measured by itself"
    sections = [
        Section("Verdict", [*_verdict(found), Cards(_cards(lines(found))), *_warnings(found)]),
        Section("All numbers", [*_worse(found), *_numbers(found), *_gates(found)]),
        Section("Layers", [*_layers(found.compression), *_distributions(found)]),
        Section("Text", texts(found)),
        Section("The same again", _again(found)),
    ]
    subtitle = f"{against}, run by {found.runner}"
    return Document(found.model, subtitle, [each for each in sections if each.blocks])


def lines_table(found: Sequence[Line], *, compares: bool) -> Table:
    """Every number; before, after and the difference where two models are compared."""
    if not compares:
        return Table(
            ("", "#value", "protocol"), [(each.title, each.written(each.value), each.protocol) for each in found]
        )
    rows = [
        (
            each.title,
            each.written(each.dense),
            with_spread(each),
            each.change_text + (" worse" if each.is_worse else ""),
            each.protocol,
        )
        for each in found
    ]
    return Table(("", "#dense", "#compressed", "#change (95 % interval)", "protocol"), rows)


def with_spread(line: Line) -> str:
    """The value with its own interval, where it has one."""
    written = line.written(line.value)
    if line.spread is None:
        return written
    low, high = line.spread
    return f"{written} ({line.written(low)} to {line.written(high)})"


def _verdict(found: Evaluation) -> list[Block]:
    blocks: list[Block] = []
    text = verdict(found)
    if text:
        blocks.append(Paragraph(text, "verdict"))
    if found.unfinished:
        left = ", ".join(found.unfinished)
        blocks.append(Paragraph(f"Not finished: {left} was not measured. The same command goes on there.", "warning"))
    return blocks


def _warnings(found: Evaluation) -> list[Block]:
    warnings = [*found.warnings, *(found.compression.warnings if found.compression else ())]
    return [Paragraph(each, "warning") for each in dict.fromkeys(warnings)]


def _cards(found: Sequence[Line]) -> list[Line]:
    first = {each.name: each for each in reversed(found)}
    return [first[name] for name in CARDS if name in first]


def _worse(found: Evaluation) -> list[Block]:
    worse = got_worse(found)
    if not found.baseline:
        return []
    if not worse:
        return [Paragraph("Nothing that was measured got worse beyond its 95 % interval.", "note")]
    names = "; ".join(f"{each.title} {each.change_text}" for each in worse)
    return [Paragraph(f"What got worse beyond its 95 % interval: {names}.", "note")]


def _numbers(found: Evaluation) -> list[Block]:
    numbers = lines(found)
    return [lines_table(numbers, compares=found.baseline is not None)] if numbers else []


def _gates(found: Evaluation) -> list[Block]:
    blocks: list[Block] = []
    for gate in found.of_kind(GateResult):
        rows = [
            (each.name, f"{each.limit:g}", f"{each.found:.4g}", each.on, "kept" if each.kept else "NOT KEPT")
            for each in gate.limits
        ]
        blocks.append(Table(("limit", "#at most", "#found", "on", ""), rows, title="Quality gate"))
    return blocks


def _layers(made: Compression | None) -> list[Block]:
    """What was done to every linear: the last row of each site."""
    if made is None or not made.sites:
        return []
    last = {row.site: row for row in made.sites}
    blocks: list[Block] = []
    for title, field, form, logarithmic in (
        ("Output error of each linear", "error", share, True),
        ("Bits per weight", "bits_per_weight", significant, False),
        ("Sparsity", "sparsity", share, False),
        ("Rank", "rank", significant, False),
        ("Parameters that are left", "parameters", significant, False),
        ("Removed units", "removed", significant, False),
    ):
        found = {name: float(value) for name, row in last.items() if (value := getattr(row, field)) is not None}
        if found:
            blocks.append(_layer_plot(title, field, found, form, logarithmic=logarithmic))
    errors = sorted((row for row in last.values() if row.error is not None), key=lambda row: -(row.error or 0))
    if errors:
        rows = [_site_row(row) for row in errors[:WORST_SITES]]
        headings = ("site", "by", "scheme", "#output error", "#plain rounding")
        blocks.append(Table(headings, rows, title=f"The worst of {len(errors)}"))
    return blocks


def _layer_plot(
    title: str, field: str, found: dict[str, float], form: Callable[[float], str], *, logarithmic: bool
) -> Block:
    """A heat map, or a sentence where all are the same or none is in a block."""
    placed = {place: value for name, value in found.items() if (place := place_of(name)) is not None}
    if len(set(found.values())) == 1 or not placed:
        values = sorted(set(found.values()))
        what = form(values[0]) if len(values) == 1 else f"{form(values[0])} to {form(values[-1])}"
        return Paragraph(f"{title}: {what} at all {len(found)} sites.")
    columns = list(dict.fromkeys(kind for _, kind in placed))
    svg, low, high = plots.heat_map(placed, columns, name=f"layers-{field}", logarithmic=logarithmic)
    scale = ", on a logarithmic scale" if logarithmic else ""
    caption = f"Faint: {form(low)}; strong: {form(high)}{scale}."
    rows = [
        (kind, *(form(value) for value in _spread([value for (_, its), value in placed.items() if its == kind])))
        for kind in columns
    ]
    return Plot(title, svg, caption, Table(("linear", "#lowest", "#median", "#highest"), rows))


def _spread(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def place_of(site: str) -> tuple[int, str] | None:
    """Block and the name within it; None for what is in no block."""
    parts = site.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else (int(parts[number]), ".".join(parts[number + 1 :]) or "block")


def _site_row(row: SiteReport) -> tuple[str, ...]:
    plain = row.error_before if row.scheme else None
    return (
        row.site,
        row.algorithm,
        row.scheme or "",
        f"{row.error:.3%}".replace("%", " %"),
        "" if plain is None else f"{plain:.3%}".replace("%", " %"),
    )


def _distributions(found: Evaluation) -> Iterable[Block]:
    both = found.of_kind(Distribution)
    for what, title in (
        ("weights", "Weights of each kind of linear"),
        ("activations", "Inputs of each kind of linear"),
    ):
        shown = [each for each in both if each.what == what]
        if not shown:
            continue
        pair = found.baseline is not None
        caption = "Filled: dense; line: compressed." if pair else ""
        rows = [(each.sites, each.of, share(each.zeros), significant(each.largest)) for each in shown]
        headings = ("linear", "model", "#zeros", "#largest magnitude")
        yield Plot(title, plots.distributions(shown, name=what), caption, Table(headings, rows))


def moved(found: TokenDivergences, number: int, *, of: str = "the compressed model") -> list[Block]:
    """KL along the windows, and the tokens that moved most; `number` tells the drawings of a page apart."""
    rows = [(f"{each.first}–{each.last}", f"{each.kl:.4f}") for each in found.positions]
    name = f"position-{number}"
    blocks: list[Block] = [
        Plot(
            f"KL of {of} by position on {found.text}",
            plots.by_position(found, name=name),
            data=Table(("positions", "#KL, nats per token"), rows),
        ),
        Paragraph(f"Where {of} departs most from the dense one on {found.text}:"),
    ]
    for each in found.worst:
        note = (
            f"KL {each.kl:.2f} nats; probability of the actual token {share(each.dense_probability)} → "
            f"{share(each.compressed_probability)}"
        )
        parts = [("actual", each.actual), ("dense", each.dense), ("compressed", each.compressed)]
        blocks.append(Passage("", each.before, parts, note))
    return blocks


def texts(found: Evaluation, *, of: str = "the compressed model", first: int = 0) -> list[Block]:
    """What models predicted and wrote; `first`: the number of drawings that a page has already."""
    blocks: list[Block] = []
    for number, each in enumerate(found.of_kind(TokenDivergences), start=first):
        blocks += moved(each, number, of=of)
    for pairs in found.of_kind(GenerationComparison):
        blocks.append(Paragraph(f"Written for {pairs.source} by the dense model and by {of}, side by side:"))
        for pair in pairs.pairs[:MOST_PAIRS]:
            parts = [("dense", pair.dense), ("compressed", pair.compressed)]
            blocks.append(Passage("", pair.prompt, parts, f"ROUGE-L {pair.rouge_l:.2f}"))
    return blocks


def _again(found: Evaluation) -> list[Block]:
    blocks: list[Block] = []
    if found.command:
        blocks.append(Code(found.command, "Command"))
    if found.compression and found.compression.recipe:
        blocks.append(Code(found.compression.recipe, "Recipe"))
    facts = [*found.machine.items(), *found.versions.items()]
    blocks.append(Table(("", ""), facts, title="Environment"))
    return blocks
