"""Measures every export target on one model: codes read back, the runtime beside PyTorch, bytes, tokens per second.

    OMP_NUM_THREADS=1 python evals/export.py --compressed out --dense SmolLM2-135M-Instruct --text WikiText-2=test.txt

The compressed folder is exported to every registered target that has a runtime of its own; where a target cannot hold
its table of embeddings, `--plain-tables` names the same codes without it. Beside each runtime stands its own rounding
of the dense model to 4 bits in equal groups (`exports/own.py`). All score the same windows, without BOS; differences
from PyTorch are paired, with the standard error over windows. Speeds are of one thread and taken in turns,
transformers with the dense model in float32 among them. Everything is written to evals/results/export-NAME.json.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import click
import torch
from exports.own import own_roundings
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.evaluation.environment import machine, versions
from llmcompress.exporters.base import EXPORTERS, Exporter
from llmcompress.exporters.contents import Contents
from llmcompress.exporting import Exportable
from llmcompress.model_export import export
from llmcompress.records.export_report import ExportReport
from llmcompress.reopening import reopen
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.torch_runner import TorchRunner

HERE = Path(__file__).resolve().parent
WINDOW = 512
PROMPT, NEW, TURNS = 128, 64, 3
DENSE = "transformers float32, dense"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Candidate:
    """Files, and who runs them."""

    name: str
    path: Path
    runner: str


@click.command()
@click.option("--compressed", required=True, help="A folder that `compress` saved.")
@click.option("--plain-tables", default=None, help="The same codes beside a dense embedding.")
@click.option("--dense", required=True, help="The dense model that it was made of.")
@click.option("--text", required=True, metavar="NAME=FILE")
@click.option("--windows", default=16, show_default=True)
@click.option("--targets", default="", help="Comma-separated; all of them if empty.")
@click.option("--own/--no-own", default=True, show_default=True, help="The runtimes' own roundings too.")
@click.option("--name", default="SmolLM2-135M-Instruct", show_default=True)
def main(
    compressed: str,
    plain_tables: str | None,
    dense: str,
    text: str,
    windows: int,
    targets: str,
    own: bool,
    name: str,
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    label, _, path = text.partition("=")
    original = reopen(dense)
    content = Path(path).read_text(encoding="utf-8")[: windows * WINDOW * 8]
    ids = original.tokenizer(content, add_special_tokens=False)["input_ids"]
    ids_BT = torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)
    with TorchRunner(original.model) as runner:
        dense_BP = losses(runner, ids_BT)
    found = {
        "model": name,
        "versions": versions(),
        "machine": machine(),
        "text": label,
        "window": WINDOW,
        "windows": windows,
        "dense_perplexity": math.exp(float(dense_BP.mean())),
        "speed": {"prompt": PROMPT, "new": NEW, "turns": TURNS, "threads": 1},
    }
    with tempfile.TemporaryDirectory() as scratch:
        rows, candidates = exported(compressed, plain_tables, targets_of(targets), Path(scratch), ids_BT, dense_BP)
        for title, target, place, runner_name in own_roundings(dense, Path(scratch), list(rows)) if own else ():
            candidates.append(Candidate(title, place, runner_name))
            rows[title] = {"target": target, "own": True, "bytes": weights_in(place)}
            with opened(candidates[-1]) as runner:
                rows[title] |= quality(losses(runner, ids_BT), dense_BP)
            print(title, rows[title], flush=True)
        measured = speeds(candidates, original)
    for title, row in rows.items():
        row.update(measured.get(title, {}))
    found |= {"rows": [{"name": title, **row} for title, row in rows.items()], "reference": measured[DENSE]}
    (HERE / "results" / f"export-{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def targets_of(given: str) -> list[str]:
    """Those asked for, or all that write for another runtime."""
    named = [each for each in given.split(",") if each]
    return named or [name for name in EXPORTERS if EXPORTERS[name].runtime != "torch" or EXPORTERS[name].cannot_run]


def exported(
    compressed: str, plain_tables: str | None, targets: Sequence[str], scratch: Path, ids_BT: Tensor, dense_BP: Tensor
) -> tuple[dict[str, dict[str, object]], list[Candidate]]:
    """Every target with its proof, and those whose runtime is installed."""
    rows, candidates = dict[str, dict[str, object]](), list[Candidate]()
    for source in filter(None, (compressed, plain_tables)):
        model = reopen(source)
        with TorchRunner(model.model) as reference:
            torch_BP = losses(reference, ids_BT)
        rows.setdefault("torch", {"target": "torch", **quality(torch_BP, dense_BP)})
        for target in targets:
            try:
                report = export(source, target, scratch / target, run=False)[target] if target not in rows else None
            except CompressError as refused:
                print(target, refused.what, flush=True)
                continue
            if report is None:
                continue
            rows[target] = {"target": target, **facts(report, EXPORTERS[target](), model.contents)}
            candidate = Candidate(target, scratch / target, EXPORTERS[target].runtime)
            if EXPORTERS[target].cannot_run is not None:
                rows[target]["not_run"] = EXPORTERS[target].cannot_run
                continue
            try:
                with opened(candidate) as runner, TorchRunner(model.model) as reference:
                    rows[target] |= compared(runner, reference, ids_BT, torch_BP, dense_BP)
                candidates.append(candidate)
            except CompressError as missing:
                rows[target]["not_run"] = missing.what
            print(target, rows[target], flush=True)
    return rows, candidates


def facts(report: ExportReport, exporter: Exporter, contents: Contents) -> dict[str, object]:
    """Of the files."""
    coded = [row for row in report.read_back if row.codes_differing is not None]
    return {
        "codes": sum(row.values for row in coded),
        "codes_differing": sum(row.codes_differing or 0 for row in coded),
        "scales_differing": sum(row.scales_differing or 0 for row in coded),
        "weights_differing": sum(row.weights_differing or 0 for row in report.read_back),
        "bytes": report.bytes,
        "formula_bytes": formula(report, exporter, contents),
    }


def formula(report: ExportReport, exporter: Exporter, contents: Contents) -> int:
    """What the exporter foretells of every matrix of codes, and what is dense in the type that it is stored as."""
    assert contents.storage_dtype is not None
    kinds = [kind for site in contents.sites for kind in exporter.tensors(site, contents.storage_dtype).values()]
    coded = sum(dtype.itemsize * prod(shape) for dtype, shape in kinds)
    wide = {"bf16": 2, "f16": 2, "bfloat16": 2, "float16": 2}
    dense = [row for row in report.read_back if row.codes_differing is None]
    return coded + sum(row.values * wide.get(row.stored_as.lower(), 4) for row in dense)


@torch.inference_mode()
def compared(
    runner: Runner, reference: Runner, ids_BT: Tensor, torch_BP: Tensor, dense_BP: Tensor
) -> dict[str, object]:
    """The runtime beside the same model in PyTorch."""
    largest, mean, same, kl, found = 0.0, [], [], [], []
    for ids_T in ids_BT:
        ours_PV, theirs_PV = (each.logits(ids_T[None])[0, :-1].float() for each in (runner, reference))
        apart_PV = (ours_PV - theirs_PV).abs()
        largest, mean = max(largest, float(apart_PV.max())), [*mean, float(apart_PV.mean())]
        same.append(float((ours_PV.argmax(-1) == theirs_PV.argmax(-1)).float().mean()))
        ours_PV, theirs_PV = ours_PV.log_softmax(-1), theirs_PV.log_softmax(-1)
        kl.append(float((theirs_PV.exp() * (theirs_PV - ours_PV)).sum(-1).mean()))
        found.append(-ours_PV.gather(-1, ids_T[1:, None]).squeeze(-1).double())
    apart_B = (torch.stack(found) - torch_BP).mean(1)
    return {
        **quality(torch.stack(found), dense_BP),
        "ratio_to_torch": math.exp(float(apart_B.mean())),
        "ratio_standard_error": float(apart_B.std() / math.sqrt(len(apart_B))),
        "largest_logit_difference": largest,
        "mean_logit_difference": statistics.mean(mean),
        "same_top": statistics.mean(same),
        "kl": statistics.mean(kl),
    }


def quality(found_BP: Tensor, dense_BP: Tensor) -> dict[str, object]:
    """Beside the dense model, paired by window."""
    apart_B = (found_BP - dense_BP).mean(1)
    return {
        "perplexity": math.exp(float(found_BP.mean())),
        "ratio_to_dense": math.exp(float(apart_B.mean())),
        "dense_standard_error": float(apart_B.std() / math.sqrt(len(apart_B))),
    }


@torch.inference_mode()
def losses(runner: Runner, ids_BT: Tensor) -> Tensor:
    """B×(T-1), in nats."""
    found = []
    for ids_T in ids_BT:
        scores_PV = runner.logits(ids_T[None])[0, :-1].float().log_softmax(-1)
        found.append(-scores_PV.gather(-1, ids_T[1:, None]).squeeze(-1).double())
    return torch.stack(found)


def opened(candidate: Candidate) -> Runner:
    """Its runner."""
    return RUNNERS[candidate.runner].open(str(candidate.path), device=CPU, dtype=torch.float32)


def weights_in(path: Path) -> int:
    """Bytes of a file, or of the weights and graphs in a folder."""
    endings = (".onnx", ".onnx_data", ".data", ".bin", ".xml", ".safetensors")
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.name.endswith(endings)]
    return sum(
        each.stat().st_size for each in files if not each.name.startswith("openvino_to") and "detok" not in each.name
    )


def speeds(candidates: Sequence[Candidate], original: Exportable) -> dict[str, dict[str, float]]:
    """Tokens per second, medians over turns in which everything runs once."""
    prompt_BT = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[tuple[float, float]]] = {DENSE: [], **{each.name: [] for each in candidates}}
    for _ in range(TURNS):
        with TorchRunner(original.model) as runner:
            taken[DENSE].append(timed(runner, prompt_BT))
        for each in candidates:
            with opened(each) as runner:
                taken[each.name].append(timed(runner, prompt_BT))
    medians = {
        name: {"prefill": statistics.median(a for a, _ in both), "decode": statistics.median(b for _, b in both)}
        for name, both in taken.items()
    }
    base = medians[DENSE]["decode"]
    return {name: {**both, "decode_to_transformers": both["decode"] / base} for name, both in medians.items()}


def timed(runner: Runner, prompt_BT: Tensor) -> tuple[float, float]:
    """Prefill and decode of one runner that is warm."""
    list(runner.stream(prompt_BT, max_new_tokens=2))
    begun = time.perf_counter()
    steps = runner.stream(prompt_BT, max_new_tokens=NEW)
    next(steps)
    first = time.perf_counter()
    list(steps)
    return PROMPT / (first - begun), (NEW - 1) / (time.perf_counter() - first)


if __name__ == "__main__":
    main()
