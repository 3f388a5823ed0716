"""Bits where they matter, and helpers at low bits, on one trained model; perplexity on text that none of them saw.

    python evals/allocation.py --name books-llama
    python evals/allocation.py --model FOLDER --calibration train.txt --text test.txt --name NAME

`allocation`: one scheme for all sites against mixed ones at the same average of stored bits, by every sensitivity.
`search`: scales and zero points without data. `helpers`: scales solved for again and biases corrected, after a
quantizer. `channels`: bits per input channel. `formats`: integers or floats, site by site. Calibration and measured
text must differ; nothing is tuned on the measured text. Writes evals/results/allocation-NAME.json after every row.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from evals.trial import Setting, Trial, run_trial
from llmcompress.evaluation.environment import machine, versions

SENSITIVITIES = ("gradients", "rate", "fisher", "hessian", "kl", "output")
PAD = "on_indivisible: pad"
SAME = "SAME"
"""Stands for the average bits, scales included, of the uniform trial before."""
HELPERS = {
    "alone": "- {quantizer}: {{scheme: {scheme}, {pad}}}",
    "scales refined": "- scale_refinement: {{scheme: {scheme}, {pad}, quantizer: {{{quantizer}: {{}}}}}}",
    "biases corrected": "- bias_correction: {{scheme: {scheme}, {pad}, new_biases: true, "
    "quantizer: {{{quantizer}: {{}}}}}}",
    "both": "- bias_correction: {{scheme: {scheme}, {pad}, new_biases: true, "
    "quantizer: {{scale_refinement: {{quantizer: {{{quantizer}: {{}}}}}}}}}}",
}
PARTS = ("allocation", "search", "helpers", "channels", "formats")


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS, show_default=True)
@click.option(
    "--group",
    default=64,
    show_default=True,
    help="of candidates and of the first uniform scheme; the second has half of it",
)
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
    group: int,
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Measure every method; what is not asked for keeps the row that the file has."""
    setting = Setting(model, calibration, text, samples, tokens, window, max_windows)
    path = Path(__file__).parent / "results" / f"allocation-{name}.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    dense = run_trial(setting)
    click.echo(f"dense {dense.perplexity.perplexity:.3f}", err=True)
    for part in parts:
        uniform_bits = 0.0
        for label, method, passes in _trials(part, group):
            passes = passes.replace(SAME, f"{uniform_bits:.6f}")
            found = [run_trial(setting, passes, seed=seed) for seed in range(_draws(passes, seeds))]
            row = {"setting": label, "method": method, **_measured(found)}
            if "mixed_precision" not in passes:
                uniform_bits = row["mean_bits"]
            others = [each for each in rows.get(part, []) if (each["setting"], each["method"]) != (label, method)]
            rows[part] = [*others, row]
            click.echo(
                f"{label:24s} {method:32s} {statistics.mean(row['perplexity']):9.3f} at {row['mean_bits']:.3f} bits",
                err=True,
            )
            facts = {
                "model": name,
                "calibration": Path(calibration).name,
                "samples": samples,
                "tokens": tokens,
                "dense": dense.perplexity.model_dump() | {"text": Path(text).name},
                "rows": rows,
                "versions": versions(),
                "machine": machine(),
            }
            path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def _trials(part: str, group: int) -> Iterator[tuple[str, str, str]]:
    """Setting, method and passes of every trial of one part."""
    if part == "allocation":
        yield from _allocations(group)
    elif part == "search":
        for bits in (3, 2):
            scheme = f"int{bits}_g{group}_asym"
            yield scheme, "rtn", f"- rtn: {{scheme: {scheme}, {PAD}}}"
            yield scheme, "rtn, range mse", f"- rtn: {{scheme: {scheme}, range: mse, {PAD}}}"
            yield scheme, "hqq", f"- hqq: {{scheme: {scheme}, {PAD}}}"
    elif part == "helpers":
        for bits in (3, 2):
            scheme = f"int{bits}_g{group}"
            for quantizer in ("rtn", "gptq"):
                for method, passes in HELPERS.items():
                    filled = passes.format(scheme=scheme, quantizer=quantizer, pad=PAD)
                    yield scheme, f"{quantizer}, {method}", filled
    elif part == "channels":
        for average in (3.0, 3.5, 4.0):
            yield f"{average:g} bits", "cmpq", f"- cmpq: {{bits: {average}}}"
        for scheme in ("int3_channel", "int4_channel"):
            yield scheme, "rtn per channel", f"- rtn: {{scheme: {scheme}}}"
    else:
        small = group // 2
        for method in (f"int4_g{small}", f"fp4_g{small}", f"nf4_g{small}"):
            yield "4 bits", f"rtn {method}", f"- rtn: {{scheme: {method}, range: mse, {PAD}}}"
        both = f"[int4_g{small}, fp4_g{small}]"
        inside = f"quantizer: {{rtn: {{range: mse, {PAD}}}}}"
        yield "4 bits", "mixture_of_formats", f"- mixture_of_formats: {{schemes: {both}, {inside}}}"
        for method in ("int8_channel_a8token", "fp8_channel_a8token"):
            yield "8 bits, activations too", f"rtn {method}", f"- rtn: {{scheme: {method}}}"
        both = "[int8_channel_a8token, fp8_channel_a8token]"
        yield "8 bits, activations too", "mixture_of_formats", f"- mixture_of_formats: {{schemes: {both}}}"


def _allocations(group: int) -> Iterator[tuple[str, str, str]]:
    """Uniform bits, and mixed ones of the same average."""
    small = group // 2
    kinds = {2: [f"g{group}"], 3: ["channel", f"g{group}", f"g{small}"], 4: ["channel", f"g{group}"]}
    rows = {bits: ["channel"] for bits in (5, 6, 8)}
    names = [f"int{bits}_{kind}" for bits, found in {**kinds, **rows}.items() for kind in found]
    candidates = "[" + ", ".join(names) + "]"
    for uniform in ("int3_channel", f"int3_g{group}", f"int3_g{small}"):
        for quantizer in ("rtn", "gptq"):
            inside = f"quantizer: {{{quantizer}: {{{PAD}}}}}"
            label = f"as {uniform}"
            yield label, f"{quantizer} {uniform}", f"- {quantizer}: {{scheme: {uniform}, {PAD}}}"
            for sensitivity in (
                SENSITIVITIES if quantizer == "gptq" and uniform.endswith(f"g{small}") else SENSITIVITIES[:1]
            ):
                fewer = ", samples: 4" if sensitivity == "kl" else ""
                options = f"bits: {SAME}, sensitivity: {sensitivity}, schemes: {candidates}, {inside}{fewer}"
                yield label, f"{quantizer}, by {sensitivity}", f"- mixed_precision: {{{options}}}"


def _draws(passes: str, seeds: int) -> int:
    """How many calibration draws differ: plain rounding and solvers without data need one."""
    data = ("gptq", "mixed_precision", "scale_refinement", "bias_correction", "cmpq")
    return seeds if any(each in passes for each in data) else 1


def _measured(found: list[Trial]) -> dict[str, Any]:
    """Perplexity of every draw; average bits, schemes and relative error of the first."""
    rows = [row for row in found[0].rows if row.bits_per_weight is not None]
    sites = {row.site: found[0].model.get_submodule(row.site) for row in rows}
    sizes = {name: int(site.out_features) * int(site.in_features) for name, site in sites.items()}
    errors = [row.error for row in rows if row.error is not None]
    return {
        "perplexity": [each.perplexity.perplexity for each in found],
        "mean_bits": sum((row.bits_per_weight or 0.0) * sizes[row.site] for row in rows) / sum(sizes.values()),
        "schemes": dict(Counter(row.scheme for row in rows if row.scheme)),
        "mean_error": statistics.mean(errors) if errors else None,
    }


if __name__ == "__main__":
    main()
