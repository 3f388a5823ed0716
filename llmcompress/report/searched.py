"""The report on a search: what was selected, the front, the plans layer by layer, what mattered, how it went."""

from __future__ import annotations

from collections import Counter

from llmcompress.records.search import MadeModel, SearchReport, SearchTrial
from llmcompress.report import plots, search_plots
from llmcompress.report.document import Block, Code, Document, Paragraph, Plot, Section, Table
from llmcompress.report.forms import share
from llmcompress.report.sections import place_of

MOST_PLANS = 4
"""Plans of the front that are drawn layer by layer."""

MOST_BARS, MOST_ROWS, MOST_WORKERS = 20, 24, 12

_TITLES = {
    "bytes": "weight files, MB",
    "memory": "peak memory, MB",
    "prefill": "prefill, ms per token",
    "decode": "decode, ms per token",
    "energy": "energy, J per token",
}
_FACTORS = {"bytes": 1e-6, "memory": 1e-6, "prefill": 1e3, "decode": 1e3, "energy": 1.0}


def search_document(found: SearchReport) -> Document:
    """The whole report."""
    sections = [
        Section("Verdict", _verdict(found)),
        Section("The front", [*_scatters(found), front_table(found)]),
        Section("Compressed for real", [_made_table(found.made)] if found.made else []),
        Section("Plans, layer by layer", _plans(found)),
        Section("How it went", _history(found)),
        Section("The same again", _again(found)),
    ]
    subtitle = f"a search among {found.plans:.2g} plans by {found.optimizer}, {len(found.trials)} trials"
    return Document(found.model, subtitle, [each for each in sections if each.blocks])


def verdict_of(found: SearchReport) -> str:
    """One sentence or two."""
    if found.selected is None:
        return "No plan that was tried keeps the limits."
    chosen = found.trial(found.selected)
    costs = ", ".join(f"{axis} {written_cost(chosen.costs.get(axis), axis)}" for axis in found.axes)
    text = f"Trial {chosen.number}: KL {chosen.loss:.4f} nats per token from dense on {chosen.tokens} tokens; {costs}."
    if found.better_uniform is not None:
        better = found.trial(found.better_uniform)
        text += f" {better.uniform} for all linears loses less and costs no more: take trial {better.number}."
    return text


def written_cost(value: float | None, axis: str) -> str:
    """For people: `1.5 MB`, `12.3 ms/token`, `0.41 J/token`."""
    if value is None:
        return "–"
    if axis in ("bytes", "memory"):
        unit, size = next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6)) if value >= size), ("kB", 1e3))
        return f"{value / size:.4g} {unit}"
    return f"{value:.3g} J/token" if axis == "energy" else f"{value * 1e3:.4g} ms/token"


def said(found: SearchReport, trial: SearchTrial) -> str:
    """A plan in a line: how often each option was chosen."""
    if trial.uniform is not None:
        return f"{trial.uniform} everywhere"
    chosen = trial.chosen.items()
    whole = {unit for unit, option in chosen if unit.endswith("(body)") and option == found.units[unit][0]}
    counts = Counter(option for unit, option in chosen if unit not in whole)
    return ", ".join(f"{count}× {option}" for option, count in counts.most_common())


def front_table(found: SearchReport) -> Table:
    """The front, and uniform plans judged on the same text."""
    headings = ("trial", "#KL, nats per token", *(f"#{axis}" for axis in found.axes), "#minus selected", "", "plan")
    numbers = dict.fromkeys([*found.front, *found.beside_uniform])
    return Table(headings, [_front_row(found, found.trial(number)) for number in list(numbers)[:MOST_ROWS]])


def _front_row(found: SearchReport, each: SearchTrial) -> tuple[str, ...]:
    beside = found.beside_uniform.get(each.number)
    difference = "" if beside is None else f"{beside.mean:+.4f} ± {beside.standard_error:.4f}"
    mark = "selected" if each.number == found.selected else "front" if each.number in found.front else ""
    loss = "–" if each.loss is None else f"{each.loss:.4f}"
    costs = (written_cost(each.costs.get(axis), axis) for axis in found.axes)
    return (str(each.number), loss, *costs, difference, mark, said(found, each))


def _verdict(found: SearchReport) -> list[Block]:
    blocks: list[Block] = [Paragraph(verdict_of(found), "verdict")]
    if found.selected is None and found.nearest is not None:
        nearest = found.trial(found.nearest)
        over = ", ".join(
            f"{axis} {written_cost(nearest.costs.get(axis), axis)} instead of {written_cost(limit, axis)}"
            for axis, limit in found.limits.items()
        )
        blocks.append(Paragraph(f"Trial {nearest.number} is nearest to them: {over}.", "warning"))
    if found.limits:
        limits = ", ".join(f"{axis} at most {written_cost(limit, axis)}" for axis, limit in found.limits.items())
        blocks.append(Paragraph(f"Limits: {limits}.", "note"))
    dense = ", ".join(f"{axis} {written_cost(value, axis)}" for axis, value in found.dense.items())
    blocks.append(Paragraph(f"The dense model: {dense}.", "note"))
    if found.beside_uniform:
        blocks.append(
            Paragraph(
                "`minus selected` is the mean difference of the loss from that of the selected plan on equal windows, "
                "± its paired standard error. Plans were chosen on that text; models are measured on another.",
                "note",
            )
        )
    return [*blocks, *(Paragraph(note, "warning") for note in found.notes)]


def _scatters(found: SearchReport) -> list[Block]:
    blocks: list[Block] = []
    most = found.trial(found.front[0]).tokens if found.front else max((each.tokens for each in found.trials), default=0)
    for axis in found.axes:
        factor = _FACTORS[axis]
        places = {
            each.number: (each.costs[axis] * factor, each.loss)
            for each in found.trials
            if each.loss is not None and axis in each.costs and each.tokens == most
        }
        uniform = {each.uniform: places[each.number] for each in found.trials if each.uniform and each.number in places}
        limit = found.limits.get(axis)
        svg = search_plots.scatter(
            [place for number, place in places.items() if number not in found.front],
            [places[number] for number in found.front if number in places],
            uniform,
            places.get(found.selected) if found.selected is not None else None,
            x=_TITLES[axis],
            name=f"search-{axis}",
            limit=None if limit is None else limit * factor,
        )
        caption = f"Plans judged on {most} tokens; lower and further left is better."
        blocks.append(Plot(f"Loss against {axis}", svg, caption))
    return blocks


def _made_table(made: tuple[MadeModel, ...]) -> Table:
    first = made[0]
    headings = ("trial", "plan", "#bytes", "#planned", "#perplexity", "#ratio to dense", "#KL", "folder")
    rows = [
        (
            str(each.trial),
            f"{each.uniform} everywhere" if each.uniform else "found",
            written_cost(float(each.bytes), "bytes"),
            written_cost(each.planned_bytes, "bytes"),
            f"{each.perplexity:.3f}",
            f"{each.ratio:.4f}" + ("" if each.ratio_error is None else f" ± {each.ratio_error:.4f}"),
            "–" if each.kl is None else f"{each.kl:.4f}",
            each.folder,
        )
        for each in made
    ]
    bos = "with" if first.bos else "without"
    title = (
        f"On {first.text}, windows of {first.window} tokens {bos} BOS; dense perplexity {first.perplexity_dense:.3f}"
    )
    return Table(headings, rows, title=title)


def _plans(found: SearchReport) -> list[Block]:
    wanted = [found.selected, *found.front] if found.selected is not None else [*found.front]
    blocks: list[Block] = []
    for number in list(dict.fromkeys(wanted))[:MOST_PLANS]:
        sites = found.kept.get(number, {})
        placed = {place: value for site, value in sites.items() if (place := place_of(site)) is not None}
        if not placed:
            continue
        columns = list(dict.fromkeys(kind for _, kind in placed))
        svg, low, high = plots.heat_map(placed, columns, name=f"plan-{number}", logarithmic=False)
        caption = f"Bytes ÷ bytes of the dense linear. Faint: {share(low)}; strong: {share(high)}."
        rows = [(site, share(value)) for site, value in sites.items()]
        blocks.append(Plot(f"Trial {number}", svg, caption, Table(("linear", "#bytes kept"), rows)))
    return blocks


def _history(found: SearchReport) -> list[Block]:
    blocks: list[Block] = []
    if found.hypervolume:
        svg = search_plots.growth(found.hypervolume, name="search-growth")
        caption = "Hypervolume of the front in the plane of loss and first cost, as a share of what it is at the end."
        blocks.append(Plot("How the front grew", svg, caption))
    if found.importance:
        shown = dict(list(found.importance.items())[:MOST_BARS])
        svg = search_plots.bars(shown, x="share of the variance of log loss", name="search-importance")
        caption = "Main effects over the trials, which were not drawn at random: a hint, no measurement."
        rows = [(unit, f"{value:.3f}") for unit, value in found.importance.items()]
        blocks.append(Plot("What mattered", svg, caption, Table(("decided", "#share"), rows)))
    spans: dict[str, list[tuple[float, float]]] = {}
    for each in found.trials:
        if each.seconds > 0:
            spans.setdefault(each.worker[:6] or "?", []).append((each.began, each.seconds))
    if spans:
        svg = search_plots.timeline(dict(list(spans.items())[:MOST_WORKERS]), name="search-timeline")
        seconds = sum(each.seconds for each in found.trials)
        blocks.append(Plot("Timeline", svg, f"{len(spans)} workers, {seconds:.0f} s of judging together."))
    failed = [(str(each.number), each.problem) for each in found.trials if each.problem]
    if failed:
        blocks.append(Table(("trial", "problem"), failed[:MOST_ROWS], title=f"{len(failed)} trials without an outcome"))
    return blocks


def _again(found: SearchReport) -> list[Block]:
    blocks: list[Block] = []
    if found.selected is not None:
        blocks.append(Code(f"llmcompress compress --from {found.folder}:{found.selected} -o out", "The selected plan"))
    blocks.append(Code(found.settings, "Search file", "yaml"))
    facts = [*found.machine.items(), *found.versions.items()]
    blocks.append(Table(("", ""), facts, title="Environment"))
    return blocks
