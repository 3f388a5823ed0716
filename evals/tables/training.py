"""Tables of trainings on a real model: quantization-aware training, healing after pruning, speed beside TRL."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from tables.cells import Facts, environment, markdown, protocol
from tables.paired import Method, chosen, difference, methods, on_common_draws

RESULTS = Path(__file__).resolve().parent.parent / "results"


def qat(facts: Facts) -> str:
    """Every row of training, below the best post-training row of the same setting, on the same windows."""
    model = facts["model"].removeprefix("qat-")
    post = json.loads((RESULTS / f"real-{model}.json").read_text(encoding="utf-8"))
    rows, texts = methods(post), facts["protocol"]["texts"]
    dense = next(row for row in rows if row.setting == "dense")
    body = []
    for setting in dict.fromkeys(trial["setting"] for trial in facts["trials"]):
        best = chosen(rows, setting, post)
        if best is not None:
            body.append(_qat_line(best, dense, best, post, texts, ""))
        for trial in facts["trials"]:
            if trial["setting"] == setting:
                row = Method(setting, "ours", f"**{trial['method']}**", ({"candidate": False, **trial},))
                body.append(_qat_line(row, dense, best, post, texts, f"{trial['training_tokens']:,}"))
    told = post["protocol"]
    about = (
        f"**{model}**: perplexity ({protocol(told['window'], told['bos'])}) × dense ± standard error over "
        "windows; KL from the dense model, nats per token over both texts; loss − post-training: nats per token, minus "
        "those of the best post-training row (it calibrates on 8,192 tokens), paired by window, first draws. Trained "
        "on WikiText-2 valid; on two texts: 27 % of the windows, the others of books train, in bfloat16; one draw. >: "
        "without the seconds of a process that was killed on the way."
    )
    header = ["weights", "method", "training tokens", *texts, "KL", "loss − post-training", "CPU s"]
    return "\n\n".join([about, markdown(header, body), environment(facts)])


def _qat_line(
    row: Method, dense: Method, best: Method | None, post: Facts, texts: Sequence[str], tokens: str
) -> list[str]:
    first = row._replace(trials=row.trials[:1])
    cells = []
    for text in texts:
        apart = difference(first, dense, post, [text])
        value = first.perplexities(text, post["tokens"][text])[0]
        cells.append(f"{value:.2f}, ×{math.exp(apart.mean):.3f} ± {math.exp(apart.mean) * apart.error:.3f}")
    against = "–"
    if best is not None and row is not best:
        apart = difference(first, best._replace(trials=best.trials[:1]), post, texts)
        against = f"{apart.mean:+.3f} ± {apart.error:.3f}"
    kl = difference(first, dense, post, texts, "kl")
    trial = first.trials[0]
    seconds = f"{'> ' if trial.get('was_killed') else ''}{trial['cpu_seconds']:.0f}"
    return [f"`{row.setting}`", row.name, tokens, *cells, f"{kl.mean:.3f} ± {kl.error:.3f}", against, seconds]


def qat_small(facts: Facts) -> str:
    """Every row of the bundled model, beside gptq at the same bits on the same windows."""
    trials = [{"who": "ours", **trial} for trial in facts["trials"]]
    rows, texts = methods({**facts, "trials": trials}), facts["protocol"]["texts"]
    dense = next(trial["dense_nats"] for trial in trials if "dense_nats" in trial)
    body = []
    for row in sorted(rows, key=lambda each: each.setting, reverse=True):
        plain = next(each for each in rows if (each.setting, each.name) == (row.setting, "gptq"))
        cells = []
        for text in texts:
            loss = dense[text] / sum(facts["tokens"][text])
            found = row.perplexities(text, facts["tokens"][text])
            cells.append(f"{mean(found):.2f}, ×{mean(found) / math.exp(loss):.4f}")
        against = ""
        if row is not plain:
            apart = difference(*on_common_draws(row, plain), facts, texts)
            against = f"{apart.mean:+.4f} ± {apart.error:.4f}"
        seconds, size = mean(trial["cpu_seconds"] for trial in row.trials), f"{row.trials[0]['bytes'] / 1e6:.2f}"
        body.append([f"`{row.setting}`", row.name, str(len(row.trials)), size, *cells, against, f"{seconds:.0f}"])
    told, model = facts["protocol"], facts["model"].removeprefix("qat-")
    about = (
        f"**{model}**: perplexity ({protocol(told['window'], told['bos'])}), × dense, mean over draws of the "
        f"{told['samples']} × {told['tokens']} training tokens; loss − gptq: nats per token, of the draws that both "
        "have, paired by window ± standard error. Trained on books valid."
    )
    return "\n\n".join(
        [
            about,
            markdown(["weights", "method", "draws", "MB", *texts, "loss − gptq", "CPU s"], body),
            environment(facts),
        ]
    )


def speed(facts: Facts) -> str:
    """Ours, TRL's and the bare loop's, job by job."""
    rows = {row["name"]: row for row in facts["rows"]}
    body = []
    for name, row in rows.items():
        job, _, who = name.partition(" / ")
        ours = next(each for title, each in rows.items() if title.startswith(f"{job} / ours"))
        ratio = "1" if row is ours else f"{row['seconds_per_step'] / ours['seconds_per_step']:.2f}"
        memory = f"{row['peak_bytes'] / 1e9:.2f}"
        turns = ", ".join(f"{each:.1f}" for each in row["by_turn"])
        body.append([job, who, f"{row['seconds_per_step']:.2f} ({turns})", ratio, memory])
    about = (
        f"**{facts['model']}**: CPU seconds of a step of {facts['batch']} × {facts['tokens']} tokens, median (of each "
        f"turn), float32 unless a row says bf16, AdamW, {facts['threads']} thread; ÷ ours; peak memory of the process, "
        "GB. On-policy: prompts of 32 tokens, 64 written by the student."
    )
    return "\n\n".join([about, markdown(["job", "", "CPU s", "÷ ours", "GB"], body), environment(facts)])


def healing(facts: Facts) -> str:
    """Recovered share of the lost log-perplexity, by tokens."""
    dense, pruned = facts["dense"], facts["pruned"]
    texts, per_step = list(dense), facts["training"]["batch"] * facts["tokens"]
    body = [["dense", "", "", *(f"{math.exp(dense[text]):.2f}" for text in texts)]]
    body.append(["pruned", "", "0", *(f"{math.exp(pruned[text]):.2f}" for text in texts)])
    for title, row in facts["rows"].items():
        trained, _, objective = title.partition("/")
        for step, found in sorted(row["points"].items(), key=lambda point: int(point[0])):
            cells = [
                f"{math.exp(found[text]):.2f}, {(pruned[text] - found[text]) / (pruned[text] - dense[text]):.0%}"
                for text in texts
            ]
            body.append([trained, objective, f"{int(step) * per_step:,}", *cells])
    settings = facts["training"]
    batch = f"{settings['batch']} × {facts['tokens']} tokens, {settings['mixed_precision'] or 'float32'}"
    about = (
        f"**{facts['model']}** without 12.5 % of its blocks and 14.5 % of what is inside the others, all weights "
        f"trained in batches of {batch}: perplexity (windows of 512 with BOS, {facts['windows']} of each text), and "
        "the share of the lost log-perplexity that is back. Points before the last are the middle of the same "
        "training, whose learning rate had not fallen yet."
    )
    header = ["trained on", "objective", "tokens", *texts]
    return "\n\n".join([about, markdown(header, body), environment(facts)])
