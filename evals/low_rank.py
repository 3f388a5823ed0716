"""Low rank on one trained model: which factors, which ranks, which branches; perplexity on text none of them saw.

    python evals/low_rank.py --name books-llama
    python evals/low_rank.py --model FOLDER --calibration train.txt --text test.txt --name NAME

`factors`: shares of parameters removed by plain, ASVD's and SVD-LLM's decomposition, then ranks from one budget.
`branches`: codes of two and three bits with and without a low-rank branch. `cuts`: as many training steps after one cut
of the ranks or between several. Calibration and measured text must differ; nothing is tuned on the measured text.
Writes evals/results/low-rank-NAME.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from evals.trial import Setting, Trial, run_trial
from llmcompress.evaluation.environment import machine, versions

FACTORS = {
    "plain svd": "ranks: uniform, whitening: none",
    "asvd": "ranks: uniform, whitening: activation",
    "svd-llm": "ranks: uniform",
    "svd-llm, refit": "ranks: uniform, refit: true",
    "plain svd, ranks by energy": "ranks: energy, whitening: none",
    "svd-llm, ranks by energy": "ranks: energy",
    "svd-llm, ranks by loss": "ranks: loss",
    "svd-llm, ranks by loss, refit": "ranks: loss, refit: true",
}
NO_DATA = ("plain svd", "plain svd, ranks by energy", "rtn")
BRANCHES = {
    "rtn": "- rtn: {{{codes}}}",
    "gptq": "- gptq: {{{codes}}}",
    "rtn + LQER": "- low_rank_correction: {{quantizer: {{rtn: {{{codes}}}}}, rank: {rank}, whitening: activation}}",
    "rtn + EoRA": "- low_rank_correction: {{quantizer: {{rtn: {{{codes}}}}}, rank: {rank}}}",
    "gptq + EoRA": "- low_rank_correction: {{quantizer: {{gptq: {{{codes}}}}}, rank: {rank}}}",
    "caldera": "- caldera: {{{codes}, rank: {rank}, iterations: 5}}",
    "caldera, int8 factors": "- caldera: {{{codes}, rank: {rank}, iterations: 5, factor_scheme: int8_channel}}",
    "caldera, int4 factors": "- caldera: {{{codes}, rank: {rank}, iterations: 5, factor_scheme: int4_g32}}",
}
CHAINS = {
    "gptq int4": "- gptq: {scheme: int4_g32, on_indivisible: pad}",
    "svd-llm 20 % → gptq int4": "- svd: {fraction: 0.2}\n- gptq: {scheme: int4_g32, on_indivisible: pad}",
    "svd-llm 20 % → rtn int4": "- svd: {fraction: 0.2}\n- rtn: {scheme: int4_g32, on_indivisible: pad}",
}
PARTS = ("factors", "branches", "chains", "cuts")


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS, show_default=True)
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.1, 0.2, 0.3, 0.4), show_default=True)
@click.option("--rank", default=16, show_default=True, help="of branches")
@click.option("--steps", default=120, show_default=True, help="training steps of `cuts`, all together")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=100, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="calibration draws; the table shows mean and range")
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    parts: tuple[str, ...],
    ratios: tuple[float, ...],
    rank: int,
    steps: int,
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Measure every method; what is not asked for keeps the row that the file has."""
    setting = Setting(model, calibration, text, samples, tokens, window, max_windows)
    path = Path(__file__).parent / "results" / f"low-rank-{name}.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    dense = run_trial(setting)
    click.echo(f"dense {dense.perplexity.perplexity:.3f}, {dense.parameters} parameters", err=True)
    for part in parts:
        for label, method, passes in _trials(part, ratios, rank, steps):
            draws = 1 if method in NO_DATA else seeds
            found = [run_trial(setting, passes, seed=seed) for seed in range(draws)]
            row = {"setting": label, "method": method, **_measured(found)}
            others = [each for each in rows.get(part, []) if (each["setting"], each["method"]) != (label, method)]
            rows[part] = [*others, row]
            click.echo(f"{label:24s} {method:32s} {statistics.mean(row['perplexity']):.3f}", err=True)
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
            path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def _trials(part: str, ratios: tuple[float, ...], rank: int, steps: int) -> Iterator[tuple[str, str, str]]:
    """Setting, method and passes of every trial of one part."""
    if part == "factors":
        for ratio in ratios:
            for method, options in FACTORS.items():
                yield f"{ratio:.0%} removed", method, f"- svd: {{fraction: {ratio}, {options}}}"
    elif part == "branches":
        for bits in (3, 2):
            codes = f"scheme: int{bits}_g32, on_indivisible: pad"
            for method, passes in BRANCHES.items():
                yield f"int{bits}_g32, rank {rank}", method, passes.format(codes=codes, rank=rank)
    elif part == "chains":
        for method, passes in CHAINS.items():
            yield "int4_g32", method, passes
    else:
        for ratio in ratios[1::2]:
            for cuts in (1, 4):
                options = f"ratio: {ratio}, cuts: {cuts}, training: {{steps: {steps}}}"
                yield f"{ratio:.0%} removed, {steps} steps", f"{cuts} cuts", f"- progressive_low_rank: {{{options}}}"


def _measured(found: list[Trial]) -> dict[str, Any]:
    """Perplexity of every draw; size and average bits of the first."""
    rows = found[0].rows
    coded = {row.site: row.bits_per_weight for row in rows if row.bits_per_weight is not None}
    sites = {name: found[0].model.get_submodule(name) for name in coded}
    sizes = {name: int(site.out_features) * int(site.in_features) for name, site in sites.items()}
    return {
        "perplexity": [each.perplexity.perplexity for each in found],
        "site_parameters": sum(row.parameters or 0 for row in rows) or None,
        "dense_sites": sum(row.rank is None and row.degraded is not None for row in rows),
        "mean_bits": sum(coded[name] * sizes[name] for name in coded) / sum(sizes.values()) if coded else None,
    }


if __name__ == "__main__":
    main()
