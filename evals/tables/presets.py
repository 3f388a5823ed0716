"""The table of presets: what each costs and saves, against what its dry run estimated. Standard library only."""

from __future__ import annotations

from tables.cells import Facts, environment, markdown


def presets(facts: Facts) -> str:
    """One line per preset, in the order in which they ran; estimated numbers stand in brackets."""
    texts = facts["texts"]
    done = [row for row in facts["rows"] if "quality" in row]
    head = (
        f"**{facts['model']}**, calibrated on at most {facts['samples']} × {facts['tokens']} tokens of "
        f"`{facts['calibration']}` (fewer where the preset takes fewer), all else as shipped but for the steps that a "
        "row names; one thread. "
        f"Perplexity in windows of {facts['window']}, each with BOS"
        + "".join(
            f"; `{text}`: dense {done[0]['quality'][text]['dense']:.2f}, {done[0]['quality'][text]['tokens']:,} tokens"
            for text in texts
            if done
        )
        + ". × is the ratio to dense ± one paired standard error over windows; in brackets what the dry run estimated, "
        "on the speed that the machine had then. Evaluating is both models, the dense one until its scores are known."
    )
    columns = ["preset", *texts, "MB", "compress, s", "evaluate, s", "peak, GB"]
    return "\n\n".join([head, markdown(columns, [_line(row, texts) for row in facts["rows"]]), environment(facts)])


def _line(row: Facts, texts: list[str]) -> list[str]:
    if "quality" not in row:
        return [f"`{row['preset']}`", row["not_done"], *[""] * (len(texts) + 3)]
    stages = row["stages"]
    evaluating = sum(seconds for name, seconds in stages.items() if name.startswith("evaluate"))
    return [
        f"`{row['preset']}`{_shortened(row.get('shortened', {}))}",
        *(_ratio(row["quality"][text]) for text in texts),
        _estimated(row["bytes"] / 1e6, row["bytes_estimated"] / 1e6, "{:.0f}"),
        _estimated(stages["compress"], row["compress_estimated"], "{:.0f}"),
        _estimated(evaluating, row["evaluate_estimated"], "{:.0f}"),
        _estimated(row["peak_bytes"] / 1e9, row["peak_estimated"] / 1e9, "{:.1f}"),
    ]


def _shortened(steps: dict[str, int]) -> str:
    told = [f"{count} steps{'' if name.endswith('training.steps') else ' a block'}" for name, count in steps.items()]
    return f", {', '.join(told)} only" if told else ""


def _ratio(found: Facts) -> str:
    error = "" if found["ratio_error"] is None else f" ±{found['ratio_error']:.3f}"
    return f"{found['compressed']:.2f}, ×{found['compressed'] / found['dense']:.3f}{error}"


def _estimated(measured: float, estimated: float | None, form: str) -> str:
    return form.format(measured) + ("" if estimated is None else f" ({form.format(estimated)})")


def plans(facts: Facts) -> str:
    """What `plan --probe` estimated beside what the run took."""
    head = (
        f"**{facts['model']}**, at most {facts['samples']} × {facts['tokens']} tokens of `{facts['calibration']}`: "
        "found (estimated by `plan --probe`), and estimated ÷ found. CPU seconds of one thread, peak of the process."
    )
    body = []
    for row in [each for each in facts["rows"] if "ratios" in each]:
        estimated, found, ratios = row["estimated"], row["found"], row["ratios"]
        body.append(
            [
                f"`{row['preset']}`",
                f"{_estimated(found['bytes'] / 1e6, estimated['bytes'] / 1e6, '{:.1f}')}, ×{ratios['bytes']:.3f}",
                f"{_estimated(found['peak_bytes'] / 1e9, estimated['peak_bytes'] / 1e9, '{:.2f}')}, "
                f"×{ratios['peak_bytes']:.2f}",
                f"{_estimated(found['seconds'], estimated['seconds'], '{:.0f}')}, ×{ratios['seconds']:.2f}",
            ]
        )
    return "\n\n".join([head, markdown(["preset", "MB", "peak, GB", "CPU s"], body), environment(facts)])
