"""Our sparsegpt and wanda against llm-compressor's: the same model, calibration tokens and sparsity, one measurement.

    python evals/peers/sparse_quality.py --name books-llama --environments FOLDER
    python evals/peers/sparse_quality.py --model FOLDER --calibration train.txt --text test.txt --name NAME ...

The peer prunes in an environment of its own (`venvs.py`) and hands over dense weights; both results are rounded to the
checkpoint's dtype and measured by our perplexity. Writes evals/results/peers-sparse-quality-NAME.json.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from statistics import mean

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from venvs import run_in

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

SHARES = {"50 %": ("sparsity: 0.5", "0:0"), "2:4": ('pattern: "2:4"', "2:4")}
METHODS = ("wanda", "sparsegpt")


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--environments", type=Path, required=True, help="where peers' environments are kept")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=60, show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    environments: Path,
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Prune with both, measure with ours."""
    source = find_source(model)
    task = PerplexityTask(source=text, window=window, bos="always", max_windows=max_windows)
    loaded = load_for_compression(source, dtype=torch.float32)
    storage_dtype, model_map = loaded.preflight.storage_dtype, map_model(loaded.model)

    def measured(tried: PreTrainedModel) -> float:
        found = perplexity(tried, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent())
        return found.perplexity

    def ours(passes: str, windows_NT: Tensor) -> float:
        tried, _ = apply_passes(
            copy.deepcopy(loaded.model),
            model_map,
            parse_recipe("passes:\n" + passes, "evals").passes,
            RunContext(windows_NT, batch=8, storage_dtype=storage_dtype),
        )
        return measured(tried)

    rows, peer_versions = [], {}
    settings = Calibration(source=calibration, samples=samples, tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        for label, (share, structure) in SHARES.items():
            for method in METHODS:
                row: dict[str, list[float]] = {"ours": [], "peer": [], "peer_zeros": []}
                for seed in range(seeds):
                    data = calibration_windows(
                        settings, loaded.tokenizer, max_positions=window, seed=seed, progress=Silent()
                    )
                    row["ours"].append(ours(f"- {method}: {{{share}}}", data.windows_NT))
                    windows, pruned = Path(folder) / "windows.safetensors", Path(folder) / "pruned.safetensors"
                    save_file({"windows": data.windows_NT.contiguous()}, windows)
                    options = ["--method", method, "--sparsity", "0.5", "--structure", structure]
                    files = ["--windows", str(windows), "--out", str(pruned)]
                    found = run_in(
                        "llm-compressor",
                        "llm_compressor.py",
                        [str(source.folder), *options, *files],
                        folder=environments,
                    )
                    theirs = copy.deepcopy(loaded.model)
                    state = {key: tensor.to(storage_dtype) for key, tensor in load_file(pruned).items()}
                    missing = theirs.load_state_dict(state, strict=False)
                    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
                    row["peer"].append(measured(theirs))
                    row["peer_zeros"].append(found["zeros"])
                    peer_versions = found["versions"]
                    click.echo(f"{label} {method} seed {seed}: {row['ours'][-1]:.3f} {row['peer'][-1]:.3f}", err=True)
                rows.append({"share": label, "method": method, **row})
                click.echo(f"{label} {method}: ours {mean(row['ours']):.3f}, peer {mean(row['peer']):.3f}", err=True)
    dense = perplexity(loaded.model, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent())
    facts = {
        "model": name,
        "peer": "llm-compressor",
        "calibration": Path(calibration).name,
        "samples": samples,
        "tokens": tokens,
        "dense": dense.model_dump() | {"text": Path(text).name},
        "rows": rows,
        "peer_versions": peer_versions,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent.parent / "results" / f"peers-sparse-quality-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
