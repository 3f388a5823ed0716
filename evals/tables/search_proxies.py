"""Tables of what stands in for the loss of a finished plan in a search: rank correlations with what it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tables.cells import Facts, environment, markdown

RECOVERY = {
    "as it is": "as it is",
    "healed": "healed block by block",
    "flash": "flash distillation",
    "supernet": "sub-network of a supernet",
}

WHERE = ["all over the space", "of one size"]
KINDS = {
    "shapes": "shapes, all weights trained",
    "joint": "shapes and bits, norms and scales trained",
    "one size": "the same, of one size",
}


def proxies(facts: Facts) -> str:
    """All that the file holds."""
    parts = [_about(facts), *(table(facts) for table in (_stages, _predictors, _recovery, _scaling))]
    return "\n\n".join([*(part for part in parts if part), environment(facts)])


def _about(facts: Facts) -> str:
    texts, training = facts["texts"], facts["training"]
    return (
        f"**{facts['model']}**, a space of {len(facts['space']['sites'])} formats for every group of linears, "
        f"{len(facts['space']['bodies'])} widths and dropped blocks. Kendall's τ ± its standard error (jackknife over "
        f"plans). Levels and trainings read `{texts['calibration']}`, proxies `{texts['judge']}`, and what they stand "
        f"for `{texts['text']}`; windows of {facts['window']} tokens with BOS. In full: {training['steps']} steps of "
        f"{training['batch']} windows."
    )


def _stages(facts: Facts) -> str:
    found = facts.get("stages", {})
    rows = [[_tokens(title), _tau(row), str(row["count"])] for title, row in found.items()]
    return markdown(["judged on", "τ with 16,384 tokens of the other text", "plans of one size"], rows) if rows else ""


def _predictors(facts: Facts) -> str:
    """Estimates alone, and every predictor by how many plans it has seen and what it starts from."""
    found: Mapping[str, Any] = facts.get("predictors", {})
    cells: dict[tuple[str, str], list[str]] = {}
    for row, tau in found.items():
        title, where = row.rsplit(", ", 1)
        learner, _, start = title.partition(", from ")
        key = (learner, start) if start else ("the estimate alone", learner)
        cells.setdefault(key, ["–", "–"])[WHERE.index(where)] = f"{tau['tau']:.2f}"
    if not cells:
        return ""
    starts = sorted({start for _, start in cells}, key=lambda start: (start != "nothing", start))
    lines = sorted({learner for learner, _ in cells}, key=lambda learner: (learner[:3] == "the", _natural(learner)))
    rows = [[line, *(" / ".join(cells.get((line, start), ["–"])) for start in starts)] for line in lines]
    first = next(iter(found.values()))
    about = (
        f"Predictors on {first['count']} + {first['count']} held-out plans, τ with the loss that the judge finds, "
        f"all over the space / of one size (standard errors are at most "
        f"{max(each['error'] for each in found.values()):.2f}), by what they correct:"
    )
    return f"{about}\n\n{markdown(['learned from', *(f'from {start}' for start in starts)], rows)}"


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _recovery(facts: Facts) -> str:
    found, seconds = facts.get("recovery", {}), facts.get("seconds_per_plan", {})
    kinds = {kind: title for kind, title in KINDS.items() if any(row.startswith(f"{kind}: ") for row in found)}
    rows = []
    for name, title in RECOVERY.items():
        cells = [found.get(f"{kind}: {name}") for kind in kinds]
        if any(cells):
            cost = max(seconds.get(f"{kind}: {name}", 0.0) for kind in kinds)
            rows.append([title, *("–" if cell is None else _tau(cell) for cell in cells), f"{cost:.1f}"])
    if not rows:
        return ""
    count, most = next(iter(found.values()))["count"], max(seconds[f"{kind}: distilled"] for kind in kinds)
    about = f"With the whole distillation, which takes {most:.0f} CPU seconds per plan, on {count} plans each:"
    return f"{about}\n\n{markdown(['judged', *kinds.values(), 'CPU s per plan'], rows)}"


def _scaling(facts: Facts) -> str:
    rows = []
    for plan, found in facts.get("scaling", {}).items():
        steps = max(found["measured"], key=int)
        law = found["law"]
        rows.append(
            [
                plan,
                f"{law['floor']:.3f} + {law['amount']:.3g} / N^{law['exponent']:.2f}",
                f"{found['expected'][steps]:.3f}",
                f"{found['measured'][steps]:.3f}",
            ]
        )
    if not rows:
        return ""
    per_step = facts["training"]["batch"] * facts["window"]
    last = max(map(int, next(iter(facts["scaling"].values()))["measured"]))
    header = ["plan", "law, from up to 48 steps", f"expected after {last} ({last * per_step:,} tokens)", "measured"]
    return markdown(header, rows)


def _tau(row: Mapping[str, float]) -> str:
    return f"{row['tau']:.2f} ± {row['error']:.2f}"


def _tokens(title: str) -> str:
    return re.sub(r"\d+", lambda number: f"{int(number[0]):,}", title)
