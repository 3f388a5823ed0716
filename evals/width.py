"""Width pruning: every score, with and without a refit, at equal parameters; perplexity on text none of them saw.

    python evals/width.py --name books-llama
    python evals/width.py --model FOLDER --calibration train.txt --text test.txt --name NAME

Calibration and measured text must differ; nothing is tuned on the measured text. A choice of units is made once for a
draw of calibration windows and refitted in every way. Writes evals/results/width-NAME.json after every variant.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import PreTrainedModel
from trial import Setting

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.whole import WholeModel
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import parameters
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.pruning.width import WidthPass
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

CPU = torch.device("cpu")
BOTH = ("none", "columns")
VARIANTS = {
    "random": ("width: {score: random}", BOTH),
    "l1": ("width: {score: l1}", BOTH),
    "l2": ("width: {score: l2}", BOTH),
    "activation": ("width: {score: activation}", BOTH),
    "fluctuation": ("width: {score: fluctuation}", (*BOTH, "bias", "scales")),
    "taylor_vector": ("width: {score: taylor_vector}", BOTH),
    "taylor_first": ("width: {score: taylor_first}", BOTH),
    "taylor_second": ("width: {score: taylor_second}", BOTH),
    "taylor_mix": ("width: {score: taylor_mix}", BOTH),
    "fisher": ("width: {score: fisher}", (*BOTH, "scales")),
    "group_fisher": ("width: {score: group_fisher}", BOTH),
    "uniqueness": ("width: {score: uniqueness}", BOTH),
    "lasso": ("width: {score: lasso}", BOTH),
    "fluctuation, global": ("width: {score: fluctuation, allocation: global}", (*BOTH, "bias")),
    "taylor_first, global": ("width: {score: taylor_first, allocation: global}", BOTH),
    "group_fisher, global": ("width: {score: group_fisher, allocation: global}", BOTH),
    "bonsai": ("bonsai: {prior: activation, masks: 100, windows: 16}", BOTH),
}
"""Name → the pass, and the refits to measure; FLAP's own is `bias`, Kwon's `scales`."""


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--ratio", default=0.25, show_default=True, help="of the channels and of the heads")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="calibration draws; the table shows mean and range")
@click.option("--only", multiple=True, help="variants to measure; the others stay as the result file has them")
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    ratio: float,
    samples: int,
    tokens: int,
    seeds: int,
    only: tuple[str, ...],
) -> None:
    """Measure every variant."""
    setting = Setting(model, calibration, text, samples=samples, tokens=tokens)
    loaded = load_for_compression(find_source(model), dtype=torch.float32)
    dense = perplexity(loaded.model, loaded.tokenizer, setting.task, device=CPU, progress=Silent())
    path = Path(__file__).parent / "results" / f"width-{name}.json"
    known: dict[tuple[str, str], Any] = {}
    if only and path.exists():
        known = {(row["variant"], row["refit"]): row for row in json.loads(path.read_text())["rows"]}
    for variant in only or VARIANTS:
        for row in measured(setting, loaded, variant, ratio=ratio, seeds=seeds):
            known[variant, row["refit"]] = row
            found = row["perplexity"]
            click.echo(f"{variant:22s} {row['refit']:8s} {statistics.mean(found):8.3f} {found}", err=True)
        facts = {
            "model": name,
            "ratio": ratio,
            "calibration": Path(calibration).name,
            "samples": samples,
            "tokens": tokens,
            "dense": dense.model_dump() | {"text": Path(text).name, "parameters": parameters(loaded.model)},
            "rows": [
                known[each, refit]
                for each, (_, refits) in VARIANTS.items()
                for refit in refits
                if (each, refit) in known
            ],
            "versions": versions(),
            "machine": machine(),
        }
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def measured(setting: Setting, loaded: Any, variant: str, *, ratio: float, seeds: int) -> list[dict[str, Any]]:
    """One row per refit."""
    text, refits = VARIANTS[variant]
    chosen = parse_recipe(f"passes:\n- {text}\n", "evals").passes[0]
    assert isinstance(chosen, WidthPass)
    chosen = chosen.model_copy(update={"fraction": ratio})
    rows = {refit: {"variant": variant, "refit": refit, "perplexity": [], "parameters": []} for refit in refits}
    seconds = []
    for seed in range(seeds):
        settings = Calibration(source=str(setting.calibration), samples=setting.samples, tokens=setting.tokens)
        data = calibration_windows(
            settings, loaded.tokenizer, max_positions=setting.window, seed=seed, progress=Silent()
        )
        whole = whole_model(loaded, loaded.model, data.windows_NT, seed)
        begin = time.process_time()
        decisions = chosen.decide(whole)
        seconds.append(round(time.process_time() - begin, 1))
        for refit in refits:
            pruned = copy.deepcopy(loaded.model)
            pass_ = chosen.model_copy(update={"refit": refit})
            for block in whole_model(loaded, pruned, data.windows_NT, seed).stream():
                block.decisions = decisions
                pass_.run(block)
                block.round_to_storage_dtype()
            result = perplexity(pruned, loaded.tokenizer, setting.task, device=CPU, progress=Silent())
            rows[refit]["perplexity"].append(result.perplexity)
            rows[refit]["parameters"].append(parameters(pruned))
    return [row | {"seconds_to_decide": seconds} for row in rows.values()]


def whole_model(loaded: Any, model: PreTrainedModel, windows_NT: Tensor, seed: int) -> WholeModel:
    """As a run makes it."""
    return WholeModel(
        model,
        map_model(loaded.model),
        RunContext(windows_NT, batch=8, device=CPU, storage_dtype=loaded.preflight.storage_dtype, seed=seed),
    )


if __name__ == "__main__":
    main()
