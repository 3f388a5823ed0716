"""Our gptq, awq and stronger recipes against llm-compressor, GPTQModel and AutoRound: one model, one set of windows.

    python evals/peers/quantization_quality.py --name books-llama --environments FOLDER
    python evals/peers/quantization_quality.py --model FOLDER --calibration train.txt --text test.txt --name NAME ...

Everybody gets the very same token ids, bits, groups and symmetry and leaves embedding and head dense; all else is the
default of each. Peers work in environments of their own (`venvs.py`) on the float32 model and hand over the dense
weights that their codes stand for, which our perplexity measures as they are, in float32. What a peer cannot do is a
row with its reason. Writes evals/results/peers-quantization-NAME.json after every measurement; what it has is not done
again.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

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
from llmcompress.modules.scheme import named_scheme
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

OURS = {
    "rtn": "[{{rtn: {{scheme: {scheme}}}}}]",
    "gptq": "[{{gptq: {{scheme: {scheme}}}}}]",
    "awq": "[{{awq: {{scheme: {scheme}}}}}]",
    "awq→gptq": "[{{awq: {{scheme: {scheme}, round: false}}}}, {{gptq: {{scheme: {scheme}}}}}]",
    "awq→gptq, sequential": "[{{awq: {{scheme: {scheme}, round: false}}}}, "
    "{{gptq: {{scheme: {scheme}, true_sequential: true}}}}]",
    "mixed precision": "[{{mixed_precision: {{bits: {bits}}}}}]",
    "errors carried on": "[{{error_propagation: {{scheme: {scheme}}}}}]",
    "mixed precision, error propagation": "[{{mixed_precision: "
    "{{bits: {bits}, quantizer: {{error_propagation: {{}}}}}}}}]",
    "learned": "[{{learned_rounding: {{scheme: {scheme}}}}}]",
    "mixed precision, learned": "[{{mixed_precision: {{bits: {bits}, quantizer: {{learned_rounding: {{}}}}}}}}]",
}
"""Defaults. `mixed precision`: a different scheme for every site at the same average bits, scales included, stored
without padding; `error propagation`: gptq on weights corrected for the errors of earlier blocks; `learned`: rounding
learned block by block. None of them was chosen on the measured text."""


class Peer(NamedTuple):
    """One method of another project."""

    environment: str
    script: str
    method: str
    note: str = ""


PEERS = (
    Peer("llm-compressor", "llm_compressor.py", "gptq"),
    Peer("llm-compressor", "llm_compressor.py", "gptq, range mse"),
    Peer("gptqmodel", "gptqmodel_codes.py", "gptq"),
    Peer("gptqmodel", "gptqmodel_codes.py", "gptq, range mse"),
    Peer("gptqmodel", "gptqmodel_codes.py", "gptq, act-order"),
    Peer("gptqmodel", "gptqmodel_codes.py", "awq"),
    Peer("llm-compressor", "llm_compressor.py", "awq", "stops without an accelerator: pinned memory left out"),
    Peer("auto-round", "auto_round_codes.py", "autoround"),
    Peer("llm-compressor", "llm_compressor.py", "awq→gptq", "as awq"),
)
Row = dict[str, Any]


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--environments", type=Path, multiple=True, help="where peers' environments are; the last makes new ones")
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    default=("int3_g32", "int4_g32", "int3_g64", "int3_g32_asym"),
    show_default=True,
)
@click.option("--only", multiple=True, help="'ours', a peer, or one with a method: 'ours gptq'; default: everything")
@click.option("--again", is_flag=True, help="forget the rows of the file that are asked for, and measure them again")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=100, show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    environments: tuple[Path, ...],
    schemes: tuple[str, ...],
    only: tuple[str, ...],
    again: bool,
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Quantize with all, measure with ours."""
    path = Path(__file__).parent.parent / "results" / f"peers-quantization-{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": [], "peer_versions": {}}
    rows: list[Row] = known["rows"]
    peer_versions: dict[str, dict[str, str]] = known["peer_versions"]
    source = find_source(model)
    task = PerplexityTask(source=text, window=window, bos="always", max_windows=max_windows)
    loaded = load_for_compression(source, dtype=torch.float32)
    storage_dtype, model_map = loaded.preflight.storage_dtype, map_model(loaded.model)
    head = loaded.model.get_output_embeddings()
    linears = sum(isinstance(each, torch.nn.Linear) and each is not head for each in loaded.model.modules())
    dense = perplexity(loaded.model, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent())
    settings = Calibration(source=calibration, samples=samples, tokens=tokens)
    windows = [
        calibration_windows(settings, loaded.tokenizer, max_positions=window, seed=seed, progress=Silent()).windows_NT
        for seed in range(seeds)
    ]

    def measured(tried: PreTrainedModel) -> float:
        found = perplexity(tried, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent())
        return found.perplexity

    def ours(recipe: str, windows_NT: Tensor) -> tuple[float, float]:
        tried, began = copy.deepcopy(loaded.model), time.process_time()
        tried, _ = apply_passes(
            tried,
            model_map,
            parse_recipe(f"passes: {recipe}", "evals").passes,
            RunContext(windows_NT, batch=8, storage_dtype=storage_dtype),
        )
        seconds = time.process_time() - began
        return measured(tried), seconds

    def theirs(peer: Peer, scheme: str, windows_NT: Tensor) -> tuple[float, float]:
        grid = named_scheme(scheme).weights
        with tempfile.TemporaryDirectory() as folder:
            data, out = Path(folder) / "windows.safetensors", Path(folder) / "dense.safetensors"
            save_file({"windows": windows_NT.contiguous()}, data)
            options = ["--method", peer.method, "--bits", str(grid.bits), "--group", str(grid.group)]
            options += [] if grid.symmetric else ["--asymmetric"]
            found = run_in(
                peer.environment,
                peer.script,
                [str(source.folder), *options, "--windows", str(data), "--out", str(out)],
                folder=next((f for f in environments if (f / peer.environment).exists()), environments[-1]),
            )
            tried = copy.deepcopy(loaded.model)
            missing = tried.load_state_dict(load_file(out), strict=False)
        assert not missing.unexpected_keys and found["rounded"] == linears, (missing, found)
        peer_versions[peer.environment] = found["versions"]
        return measured(tried), found["cpu_seconds"]

    def row_of(scheme: str, who: str, method: str, note: str) -> Row:
        for row in rows:
            if (row["scheme"], row["who"], row["method"]) == (scheme, who, method):
                return row
        rows.append({"scheme": scheme, "who": who, "method": method, "perplexity": [], "cpu_seconds": [], "note": note})
        return rows[-1]

    def write() -> None:
        facts = {
            "model": name,
            "calibration": Path(calibration).name,
            "samples": samples,
            "tokens": tokens,
            "dense": dense.model_dump() | {"text": Path(text).name},
            "rows": rows,
            "recipes": OURS,
            "peer_versions": peer_versions,
            "versions": versions(),
            "machine": machine(),
        }
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    tasks: list[tuple[str, str, Peer | None, str]] = [("ours", method, None, "") for method in OURS]
    tasks += [(peer.environment, peer.method, peer, peer.note) for peer in PEERS if environments]
    for scheme in schemes:
        for who, method, peer, note in tasks:
            if only and not {who, f"{who} {method}"} & {*only}:
                continue
            row = row_of(scheme, who, method, note)
            if again:
                row.update(perplexity=[], cpu_seconds=[])
                row.pop("reason", None)
            for seed in range(len(row["perplexity"]), 1 if method == "rtn" else seeds):
                if row.get("reason"):
                    break
                try:
                    if peer is None:
                        found, seconds = ours(
                            OURS[method].format(scheme=scheme, bits=stored_bits(scheme)), windows[seed]
                        )
                    else:
                        found, seconds = theirs(peer, scheme, windows[seed])
                    row["perplexity"].append(found)
                    row["cpu_seconds"].append(round(seconds, 2))
                except RuntimeError as failure:
                    row["reason"] = reason(failure)
                write()
            shown = f"{mean(row['perplexity']):.3f} {row['perplexity']}" if row["perplexity"] else row.get("reason")
            click.echo(f"{scheme:14s} {who:15s} {method:16s} {shown}", err=True)
    write()
    click.echo(str(path))


def stored_bits(scheme: str) -> float:
    """Bits of a code and of its share of a group's scale and zero point."""
    grid = named_scheme(scheme).weights
    return grid.bits + grid.scale_bits(1, int(grid.group or 0), 16) / int(grid.group or 1)


def reason(failure: RuntimeError) -> str:
    """The last line of a peer's output that says anything."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line or "xception" in line), lines[-1])[:300]


if __name__ == "__main__":
    main()
