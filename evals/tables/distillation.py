"""Tables of distillation: every objective on one student, and what training brings back after pruning."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
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


def healing(facts: Facts) -> str:
    """Share of the lost log-perplexity that is back, by tokens, on text of either kind."""
    texts = list(facts["dense"])
    per_step = facts["training"]["batch"] * facts["tokens"]
    rows = []
    for title, row in facts["rows"].items():
        for step, found in sorted(row["points"].items(), key=lambda point: int(point[0])):
            shares = [_share(facts, text, found[text]) for text in texts]
            rows.append([title, f"{int(step) * per_step:,}", *shares])
    pruned = facts["pruned"]
    dense = ", ".join(f"{text} {exp(value):.2f} → {exp(pruned[text]):.2f}" for text, value in facts["dense"].items())
    about = (
        f"**{facts['model']}** without a quarter of its blocks' parameters (perplexity, window 512 with BOS, "
        f"{facts['windows']} windows of each text: {dense}), then trained on one text with one objective. Cells: "
        f"recovered share of the lost log-perplexity, and perplexity."
    )
    header = ["trained on / objective", "tokens", *texts]
    return "\n\n".join([about, markdown(header, rows), environment(facts)])


def _cell(found: Sequence[float | None], form: str) -> str:
    there = [each for each in found if each is not None]
    if not there:
        return "–"
    between = f" ({form.format(min(there))}–{form.format(max(there))})" if len(there) > 1 else ""
    return form.format(mean(there)) + between


def _share(facts: Facts, text: str, value: float) -> str:
    dense, pruned = facts["dense"][text], facts["pruned"][text]
    return f"{(pruned - value) / (pruned - dense):.0%}, {exp(value):.2f}"
