"""Measures every export target on one model: codes read back, the runtime beside PyTorch, bytes, tokens per second.

    OMP_NUM_THREADS=1 python evals/export.py --compressed out --dense SmolLM2-135M-Instruct --text WikiText-2=test.txt

The compressed folder is exported to every registered target that has a runtime of its own; where a target cannot hold
its table of embeddings, `--plain-tables` names the same codes without it. Beside each runtime stands its own rounding
of the dense model to 4 bits in equal groups (`exports/own.py`). All score the same windows, without BOS; differences
from PyTorch are paired, with the standard error over windows. Speeds are taken in turns (`exports/turns.py`),
transformers with the dense model in float32 among them. Everything is written to evals/results/export-NAME.json.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import click
import torch
from exports.own import OWN_GENAI, OWN_GGUF, OWN_ONNX, OWN_OPENVINO, own_roundings
from exports.turns import DENSE, PROTOCOL, Candidate, opened, speeds
from gguf import GGUFReader
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.evaluation.environment import machine, versions
from llmcompress.exporters.base import EXPORTERS, Exporter
from llmcompress.exporters.contents import Contents
from llmcompress.model_export import export
from llmcompress.records.export_report import ExportReport
from llmcompress.reopening import reopen
from llmcompress.runners.base import Runner
from llmcompress.runners.torch_runner import TorchRunner

HERE = Path(__file__).resolve().parent
WINDOW = 512
GRAPHS = ("model.onnx", "openvino_model.xml")
FLOAT32 = {"accuracy_level": 0, "accuracy_level_of_8_bits": 4}
"""Of matrices in 4 bits; the runtime has no fast kernel for those in 8."""


@dataclass(frozen=True)
class Row:
    """One way to write a model."""

    name: str
    target: str
    options: Mapping[str, object] = field(default_factory=dict)
    beside: str | None = None
    """What the runtime's own tool makes in the same shape and groups."""
    plain_table: bool = False
    """Of the codes beside a dense embedding: the runtime's own tool leaves it dense."""


ROWS = (
    Row("gguf", "gguf", beside=OWN_GGUF),
    Row("onnx", "onnx"),
    Row("onnx, table float32", "onnx", beside=OWN_ONNX, plain_table=True),
    Row("onnx, activations float32", "onnx", FLOAT32),
    Row("onnx_genai", "onnx_genai", beside=OWN_GENAI),
    Row("onnx_genai, activations float32", "onnx_genai", FLOAT32),
    Row("openvino", "openvino", beside=OWN_OPENVINO),
)
"""Of targets with more than one; every other target has one with its own name."""


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
        dense_BP = scored(runner, ids_BT)
    found = {
        "model": name,
        "versions": versions(),
        "machine": machine(),
        "text": label,
        "window": WINDOW,
        "windows": windows,
        "dense_perplexity": math.exp(float(dense_BP.mean())),
        "speed": PROTOCOL,
    }
    with tempfile.TemporaryDirectory() as scratch:
        rows, candidates = exported(compressed, plain_tables, rows_of(targets), Path(scratch), ids_BT, dense_BP)
        made = {str(row["target"]) for row in rows.values()}
        for title, target, place, runner_name in own_roundings(dense, Path(scratch), sorted(made)) if own else ():
            candidates.append(Candidate(title, place, runner_name))
            rows[title] = {"target": target, "own": True, "bytes": weights_in(place)}
            with opened(candidates[-1]) as runner:
                rows[title] |= quality(scored(runner, ids_BT), dense_BP)
            print(title, rows[title], flush=True)
        measured = speeds(candidates, original.model)
    for title, row in rows.items():
        row.update(measured.get(title, {}))
    found |= {"rows": [{"name": title, **row} for title, row in rows.items()], "reference": measured[DENSE]}
    (HERE / "results" / f"export-{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def rows_of(given: str) -> list[Row]:
    """Of the targets asked for, or of all that write for another runtime."""
    named = [each for each in given.split(",") if each]
    targets = named or [name for name in EXPORTERS if EXPORTERS[name].runtime != "torch" or EXPORTERS[name].cannot_run]
    several = {row.target for row in ROWS}
    return [row for row in ROWS if row.target in targets] + [Row(each, each) for each in targets if each not in several]


def exported(
    compressed: str, plain_tables: str | None, wanted: Sequence[Row], scratch: Path, ids_BT: Tensor, dense_BP: Tensor
) -> tuple[dict[str, dict[str, object]], list[Candidate]]:
    """Every row with its proof, and those whose runtime is installed."""
    rows, candidates = dict[str, dict[str, object]](), list[Candidate]()
    for source in filter(None, (compressed, plain_tables)):
        model = reopen(source)
        reference_BPV = logits_of(model.model, ids_BT, scratch / "reference.pt")
        rows.setdefault("torch", {"target": "torch", **quality(losses(reference_BPV, ids_BT), dense_BP)})
        for row in wanted:
            if row.name in rows or (row.plain_table and source == compressed):
                continue
            place, options = scratch / str(len(rows)), {row.target: row.options}
            try:
                report = export(source, row.target, place, options=options, run=False)[row.target]
            except CompressError as refused:
                print(row.name, refused.what, flush=True)
                continue
            exporter = EXPORTERS[row.target]()
            rows[row.name] = {"target": row.target, **facts(report, exporter, model.contents, place)}
            if exporter.cannot_run is not None:
                rows[row.name]["not_run"] = exporter.cannot_run
                continue
            candidate = Candidate(row.name, place, exporter.runtime, row.beside)
            try:
                with opened(candidate) as runner:
                    rows[row.name] |= compared(runner, reference_BPV, ids_BT, dense_BP)
                candidates.append(candidate)
            except CompressError as missing:
                rows[row.name]["not_run"] = missing.what
            print(row.name, rows[row.name], flush=True)
    return rows, candidates


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids_BT: Tensor, file: Path) -> Tensor:
    """B×(T-1)×V float32, mapped from a file."""
    with TorchRunner(model) as runner:
        torch.save(torch.stack([runner.logits(ids_T[None])[0, :-1].float() for ids_T in ids_BT]), file)
    return torch.load(file, mmap=True)


def facts(report: ExportReport, exporter: Exporter, contents: Contents, place: Path) -> dict[str, object]:
    """Of the files."""
    coded = [row for row in report.read_back if row.codes_differing is not None]
    return {
        "codes": sum(row.values for row in coded),
        "codes_differing": sum(row.codes_differing or 0 for row in coded),
        "scales_differing": sum(row.scales_differing or 0 for row in coded),
        "weights_differing": sum(row.weights_differing or 0 for row in report.read_back),
        "bytes": report.bytes,
        "description_bytes": description_in(place),
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
def compared(runner: Runner, reference_BPV: Tensor, ids_BT: Tensor, dense_BP: Tensor) -> dict[str, object]:
    """The runtime beside the same model in PyTorch."""
    largest, mean, same, kl, found = 0.0, [], [], [], []
    for ids_T, theirs_PV in zip(ids_BT, reference_BPV, strict=True):
        ours_PV = runner.logits(ids_T[None])[0, :-1].float()
        apart_PV = (ours_PV - theirs_PV).abs()
        largest, mean = max(largest, float(apart_PV.max())), [*mean, float(apart_PV.mean())]
        same.append(float((ours_PV.argmax(-1) == theirs_PV.argmax(-1)).float().mean()))
        ours_PV, theirs_PV = ours_PV.log_softmax(-1), theirs_PV.log_softmax(-1)
        kl.append(float((theirs_PV.exp() * (theirs_PV - ours_PV)).sum(-1).mean()))
        found.append(-ours_PV.gather(-1, ids_T[1:, None]).squeeze(-1).double())
    apart_B = (torch.stack(found) - losses(reference_BPV, ids_BT)).mean(1)
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
def scored(runner: Runner, ids_BT: Tensor) -> Tensor:
    """B×(T-1), in nats."""
    return torch.cat([losses(runner.logits(ids_T[None])[:, :-1], ids_T[None]) for ids_T in ids_BT])


def losses(logits_BPV: Tensor, ids_BT: Tensor) -> Tensor:
    """B×(T-1), in nats."""
    pairs = zip(logits_BPV, ids_BT, strict=True)
    found = [-each_PV.float().log_softmax(-1).gather(-1, ids_T[1:, None]).squeeze(-1) for each_PV, ids_T in pairs]
    return torch.stack(found).double()


def description_in(place: Path) -> int:
    """Bytes that are no tensors of the model: graphs, names, and in GGUF the tokenizer."""
    graphs = sum((place / name).stat().st_size for name in GRAPHS if (place / name).exists())
    for file in place.glob("*.gguf"):
        graphs += int(GGUFReader(file).data_offset)
    for file in place.glob("*.safetensors"):
        with file.open("rb") as content:
            graphs += 8 + int.from_bytes(content.read(8), "little")
    return graphs


def weights_in(path: Path) -> int:
    """Bytes of a file, or of the weights and graphs in a folder."""
    endings = (".onnx", ".onnx_data", ".data", ".bin", ".xml", ".safetensors")
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.name.endswith(endings)]
    return sum(
        each.stat().st_size for each in files if not each.name.startswith("openvino_to") and "detok" not in each.name
    )


if __name__ == "__main__":
    main()
