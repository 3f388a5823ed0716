"""SliceGPT in both forms on one trained model, at several widths: perplexity on text none of them saw, and parameters.

    python evals/slicegpt.py --name books-llama
    python evals/slicegpt.py --model FOLDER --calibration train.txt --text test.txt --name NAME

One basis for the whole stream is also measured at the width at which it has as many parameters as the shortcuts.
Calibration and measured text must differ; nothing is tuned on the measured text.
Writes evals/results/slicegpt-NAME.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import click
from trial import Setting, Trial, run_trial

from llmcompress.evaluation.environment import machine, versions

METHODS = {
    "random basis": "basis: random, refit: false",
    "pca": "refit: false",
    "pca, refit": "refit: true",
    "shortcuts, random": "form: shortcuts, basis: random",
    "shortcuts, pca": "form: shortcuts",
}
EQUAL = {"pca, as large as shortcuts": "refit: false", "pca, refit, as large as shortcuts": "refit: true"}


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.1, 0.2, 0.25, 0.3), show_default=True)
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=100, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="calibration draws; the table shows mean and range")
@click.option("--round-to", default=8, show_default=True)
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    ratios: tuple[float, ...],
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
    round_to: int,
) -> None:
    """Measure every method at every width."""
    setting = Setting(model, calibration, text, samples, tokens, window, max_windows)
    dense = run_trial(setting)
    width = dense.model.config.hidden_size
    rows: list[dict[str, object]] = []

    def measured(label: str, method: str, options: str) -> list[Trial]:
        trials = [run_trial(setting, f"- slicegpt: {{{options}}}", seed=seed) for seed in range(seeds)]
        found = [trial.perplexity.perplexity for trial in trials]
        rows.append({"ratio": label, "method": method, "perplexity": found, "parameters": trials[0].parameters})
        click.echo(
            f"{label:5s} {method:36s} {statistics.mean(found):9.3f} {trials[0].parameters:>10,} {found}", err=True
        )
        return trials

    for ratio in ratios:
        label = f"{ratio:.0%}"
        sizes = {
            method: measured(label, method, f"ratio: {ratio}, round_to: {round_to}, {options}")[0].parameters
            for method, options in METHODS.items()
        }
        kept = int((1 - ratio) * width) // round_to * round_to
        same = _width_for(sizes["shortcuts, pca"], [(kept, sizes["pca"]), *_untied(setting, width)], width)
        for method, options in EQUAL.items():
            # half a channel more, so that no rounding of the product loses one
            measured(label, method, f"ratio: {max(0.0, 1 - (same + 0.5) / width)}, round_to: 1, {options}")
        # after every width: a long run that is stopped has shown something
        facts = {
            "model": name,
            "calibration": Path(calibration).name,
            "samples": samples,
            "tokens": tokens,
            "dense": dense.perplexity.model_dump() | {"text": Path(text).name},
            "parameters": dense.parameters,
            "rows": rows,
            "versions": versions(),
            "machine": machine(),
        }
        path = Path(__file__).parent / "results" / f"slicegpt-{name}.json"
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        click.echo(str(path))


def _untied(setting: Setting, width: int) -> Iterable[tuple[int, int]]:
    """The full width and its parameters, the head with a weight of its own."""
    yield width, run_trial(setting, "- slicegpt: {fraction: 0, basis: random, refit: false}").parameters


def _width_for(parameters: int, known: list[tuple[int, int]], most: int) -> int:
    """The widest stream with at most so many parameters, which grow in proportion to it."""
    (narrow, few), (wide, many) = known
    return min(most, narrow + int((parameters - few) * (wide - narrow) / (many - few)))


if __name__ == "__main__":
    main()
