"""Tables of distillation: every objective on one student, and the loss around students."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from tables.cells import Facts, environment, markdown

COLUMNS = {
    "forward_kl": ("KL(teacher ‖ student)", "{:.3f}"),
    "reverse_kl": ("KL(student ‖ teacher)", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "ece": ("calibration error", "{:.4f}"),
    "rouge_l": ("ROUGE-L to the teacher", "{:.3f}"),
    "seconds_per_step": ("s per step", "{:.2f}"),
}


def objectives(facts: Facts) -> str:
    """One line per objective: mean and range over seeds."""
    rows = [["before", *(_cell([facts["student"].get(name)], form) for name, (_, form) in COLUMNS.items())]]
    for title in dict.fromkeys(row["row"] for row in facts["rows"]):
        found = [row for row in facts["rows"] if row["row"] == title]
        rows.append([title, *(_cell([row[name] for row in found], form) for name, (_, form) in COLUMNS.items())])
    seeds = max(sum(row["row"] == each["row"] for row in facts["rows"]) for each in facts["rows"])
    training = facts["training"]
    teacher, rate = facts["teacher"], training["learning_rate"]
    about = (
        f"**{facts['model']}**, one of its blocks and a quarter of the others' parameters removed, taught by the "
        f"whole model: {training['steps']} steps of {training['batch']} windows of {facts['tokens']} tokens of "
        f"`builtin:calibration`, learning rate {rate:g}; measured on `builtin:evaluation`, windows of "
        f"{facts['tokens']} with BOS. Mean (lowest–highest) of up to {seeds} seeds. The whole model: perplexity "
        f"{teacher['perplexity']:.2f}, calibration error {teacher['ece']:.4f}."
    )
    header = ["objective", *(name for name, _ in COLUMNS.values())]
    return "\n\n".join([about, markdown(header, rows), environment(facts)])


def landscapes(facts: Facts) -> str:
    """Loss, how it rises nearby, and the highest barrier on the way to any other student."""
    barriers = facts["barriers"]
    body = []
    for row in facts["rows"]:
        highest = max(each["barrier"] for each in barriers if row["row"] in each["rows"])
        far = [row["line"][0], row["line"][-1]]
        cells = (row["loss"], row["sharpness"], mean(far) - row["loss"], highest)
        body.append([row["row"], *(f"{value:.4f}" for value in cells)])
    training, end = facts["training"], max(facts["at"])
    about = (
        f"**{facts['model']}**: students of different objectives, same start, text, order and {training['steps']} "
        f"steps of {training['batch']} windows of {facts['tokens']} tokens, one seed. Cross-entropy in nats on 16 "
        f"windows of `builtin:evaluation`; its rise at distance {facts['near']:g} (mean of five random directions, "
        f"every row of a matrix as long as the student's) and at {end:g} (one direction, both ways); the highest point "
        "of the straight line to any other student, above the line between their losses."
    )
    header = ["objective", "loss", f"rise at {facts['near']:g}", f"rise at {end:g}", "barrier"]
    return "\n\n".join([about, markdown(header, body), environment(facts)])


def _cell(found: Sequence[float | None], form: str) -> str:
    there = [each for each in found if each is not None]
    if not there:
        return "–"
    between = f" ({form.format(min(there))}–{form.format(max(there))})" if len(there) > 1 else ""
    return form.format(mean(there)) + between
