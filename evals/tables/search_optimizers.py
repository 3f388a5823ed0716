"""Optimizers of a search, compared on a table of all plans of a small space. Standard library only."""

from __future__ import annotations

from typing import Any

from tables.cells import Facts, markdown


def optimizers(facts: Facts) -> str:
    """Regret by forward tokens spent, with its standard error, the best of each column in bold."""
    protocol = facts["protocol"]
    budgets = [str(budget) for budget in protocol["budgets"]]
    rows = facts["rows"]
    header = ["", *(f"after {budget}" for budget in budgets), f"optimum found after {budgets[-1]}"]
    lines = [
        [
            row["optimizer"],
            *(_cell(row, budget, rows) for budget in budgets),
            f"{100 * row['optimum'][budgets[-1]]:.0f} %",
        ]
        for row in rows
    ]
    shares = " and ".join(f"{100 * share:.0f} %" for share in protocol["shares"])
    about = (
        f"log(loss ÷ least loss within the limit), mean ± standard error over {protocol['seeds']} seeds and limits of "
        f"bytes {shares} of the way from the smallest plan to the largest; in bold what is not worse than the best of "
        "its column by more than two standard errors of the difference. What is spent is counted in forward tokens, "
        "in units of one plan judged: a gradient counts four for every body that has a share. "
        f"All {protocol['plans']} plans of `{protocol['model']}` were judged on {protocol['judged']} windows of "
        f"{protocol['window']} tokens. –: with some seed no plan within the limit was judged yet."
    )
    return f"{markdown(header, lines)}\n\n{about}"


def _cell(row: dict[str, Any], budget: str, rows: list[dict[str, Any]]) -> str:
    value = row["regret"][budget]
    if value is None:
        return "–"
    mean, error = value
    best = min((each["regret"][budget] for each in rows if each["regret"][budget]), key=lambda found: found[0])
    shown = f"{mean:.3f} ± {error:.3f}"
    return f"**{shown}**" if mean - best[0] <= 2 * (error**2 + best[1] ** 2) ** 0.5 else shown
