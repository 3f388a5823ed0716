"""The report on several models beside the same dense one: verdicts, one table, quality against size and speed."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.errors import CompressError, ExitCode
from llmcompress.records.evaluation import Comparison, Evaluation
from llmcompress.records.inside import TokenDivergences
from llmcompress.report import plots
from llmcompress.report.document import Block, Code, Document, Paragraph, Plot, Section, Table
from llmcompress.report.kinds import lines
from llmcompress.report.lines import Line
from llmcompress.report.plots import Point, pareto
from llmcompress.report.sections import texts, with_spread
from llmcompress.report.verdict import got_worse, verdict

SIZE, QUALITY, SPEED = "weight files", "perplexity", "decode, tokens/s"
"""Names of the lines that are drawn against each other."""


def comparison_document(found: Comparison) -> Document:
    """The whole report."""
    sections = [
        Section("Verdict", verdicts(found)),
        Section("Quality against size and speed", _fronts(found)),
        Section("All numbers", [comparison_table(found)]),
        Section("What got worse", [worse_table(found)]),
        Section("Text", _texts(found)),
        Section("The same again", _again(found)),
    ]
    names = ", ".join(names_of(found.evaluations))
    return Document(f"{found.base} and {names}", "every model against the first", sections)


def as_comparison(found: Sequence[Evaluation | Comparison]) -> Comparison:
    """Saved evaluations as one comparison.

    Raises: CompressError when they were not measured against the same dense model.
    """
    flat = [one for each in found for one in (each.evaluations if isinstance(each, Comparison) else (each,))]
    bases = list(dict.fromkeys(each.baseline for each in flat))
    if len(bases) != 1 or bases[0] is None:
        told = ", ".join(base or "none" for base in bases)
        raise CompressError(
            "compare.bases",
            f"the reports have different dense models: {told}",
            where="baseline",
            fix="evaluate every model with the same `baseline`",
            exit_code=ExitCode.USAGE,
        )
    return Comparison(base=bases[0], evaluations=tuple(flat))


def names_of(found: Sequence[Evaluation]) -> list[str]:
    """The models, told apart by their runtime or number where two have the same name."""
    names = [each.model for each in found]
    told = [
        name if names.count(name) == 1 else f"{name} ({each.runner})" for name, each in zip(names, found, strict=True)
    ]
    return [name if told.count(name) == 1 else f"{name} {number}" for number, name in enumerate(told, start=1)]


def verdicts(found: Comparison) -> list[Block]:
    """One for every model."""
    named = zip(names_of(found.evaluations), found.evaluations, strict=True)
    return [Paragraph(f"{name}: {verdict(each) or 'nothing was compared.'}", "plain") for name, each in named]


def comparison_table(found: Comparison) -> Table:
    """A row for every number that any model has, a column for the dense model and every other."""
    by_model = [{line.key: line for line in lines(each)} for each in found.evaluations]
    first: dict[tuple[str, str], Line] = {}
    for its in by_model:
        for key, line in its.items():
            if key not in first or (first[key].dense is None and line.dense is not None):
                first[key] = line
    rows = [
        (line.title, line.written(line.dense), *(_cell(its.get(key)) for its in by_model))
        for key, line in first.items()
    ]
    return Table(("", f"#{found.base}", *(f"#{name}" for name in names_of(found.evaluations))), rows)


def worse_table(found: Comparison) -> Table:
    """Every number that is worse beyond its 95 % interval."""
    named = zip(names_of(found.evaluations), found.evaluations, strict=True)
    rows = [(name, line.title, line.change_text) for name, each in named for line in got_worse(each)]
    return Table(("model", "number", "#change (95 % interval)"), rows or [("–", "nothing beyond its interval", "")])


def _cell(line: Line | None) -> str:
    if line is None:
        return "–"
    change = line.change_text
    return f"{line.written(line.value)}, {change}" if change else with_spread(line)


def _fronts(found: Comparison) -> list[Block]:
    """Perplexity against bytes, and against tokens per second, on the first text that all have."""
    quality = _shared(found, QUALITY)
    blocks: list[Block] = []
    if quality is None:
        return blocks
    for name, label, factor, larger in ((SIZE, "weight files, MB", 1e-6, False), (SPEED, SPEED, 1.0, True)):
        other = _shared(found, name)
        if other is None:
            continue
        points = _points(found, other, quality, factor)
        svg = plots.front(
            points, x=label, y=f"perplexity on {quality[1]}", larger_x_is_better=larger, name=f"front-{int(larger)}"
        )
        best = {point.name for point in pareto(points, larger_x_is_better=larger)}
        rows = [(p.name, f"{p.x:.4g}", f"{p.y:.4g}", "yes" if p.name in best else "no") for p in points]
        title = "Perplexity against tokens per second" if larger else "Perplexity against size"
        caption = "Lower is better; the line joins models that no other one beats in both numbers."
        headings = ("model", f"#{label}", "#perplexity", "on the front")
        blocks.append(Plot(title, svg, caption, Table(headings, rows)))
    return blocks


def _shared(found: Comparison, name: str) -> tuple[str, str] | None:
    """The first line of that name that every model has."""
    keys = [
        [line.key for line in lines(each) if line.name == name and line.value is not None] for each in found.evaluations
    ]
    return next((key for key in keys[0] if all(key in its for its in keys)), None) if keys else None


def _points(found: Comparison, x: tuple[str, str], y: tuple[str, str], factor: float) -> list[Point]:
    points: list[Point] = []
    for name, each in zip(names_of(found.evaluations), found.evaluations, strict=True):
        its = {line.key: line for line in lines(each)}
        across, up = its[x], its[y]
        if not points and across.dense is not None and up.dense is not None:
            points.append(Point(found.base, across.dense * factor, up.dense))
        assert across.value is not None and up.value is not None
        points.append(Point(name, across.value * factor, up.value))
    return points


def _texts(found: Comparison) -> list[Block]:
    blocks: list[Block] = []
    number = 0
    for name, each in zip(names_of(found.evaluations), found.evaluations, strict=True):
        blocks += texts(each, of=name, first=number)
        number += len(each.of_kind(TokenDivergences))
    return blocks


def _again(found: Comparison) -> list[Block]:
    blocks: list[Block] = [Code(found.command, "Command")] if found.command else []
    for name, each in zip(names_of(found.evaluations), found.evaluations, strict=True):
        if each.compression and each.compression.recipe:
            blocks.append(Code(each.compression.recipe, f"Recipe of {name}"))
    facts = [*found.evaluations[0].machine.items(), *found.evaluations[0].versions.items()]
    blocks.append(Table(("", ""), facts, title="Environment"))
    return blocks
