"""Measures an export: codes read back, perplexity in the runtime beside PyTorch, bytes, tokens per second.

    python evals/export.py --compressed out --dense SmolLM2-135M-Instruct --text WikiText-2=wikitext-2/test.txt

The compressed folder (gptq int4_g64, embeddings int8) is exported to GGUF and run in llama.cpp. Beside it stand
llama.cpp's own formats of the same dense model: Q4_0 and Q4_K_M as its quantizer makes them by default, and Q4_0 with
an 8-bit table. All score the same windows: `--windows` of 512 tokens, without BOS. Differences from PyTorch are paired,
with the standard error over windows. `second_half` is the protocol of the program llama-perplexity: windows of 512
tokens that begin with BOS where the file says so, scored from position 256 on. Speeds are of one thread; files are run
in turns. Everything is written to evals/results/export-gguf-NAME.json.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from llmcompress.evaluation.environment import machine, versions
from llmcompress.exporting import Exportable
from llmcompress.model_export import export
from llmcompress.records.export_report import EXPORT_REPORT
from llmcompress.reopening import reopen
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.torch_runner import TorchRunner

HERE = Path(__file__).resolve().parent
WINDOW = 512
PROMPT, NEW, TURNS = 128, 64, 3
OURS = "llmcompress gptq int4_g64, table int8"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Candidate:
    """A file, and how it was made."""

    name: str
    file: Path


@click.command()
@click.option("--compressed", required=True, help="A folder that `compress` saved.")
@click.option("--dense", required=True, help="The dense model that it was made of.")
@click.option("--text", required=True, metavar="NAME=FILE")
@click.option("--windows", default=16, show_default=True)
@click.option("--name", default="SmolLM2-135M-Instruct", show_default=True)
def main(compressed: str, dense: str, text: str, windows: int, name: str) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    label, _, path = text.partition("=")
    opened = reopen(compressed)
    content = Path(path).read_text(encoding="utf-8")[: windows * WINDOW * 8]
    ids = opened.tokenizer(content, add_special_tokens=False)["input_ids"]
    plain = torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)
    found: dict[str, object] = {"versions": versions(), "machine": machine(), "text": label, "window": WINDOW}
    with tempfile.TemporaryDirectory() as scratch:
        candidates = made(compressed, dense, Path(scratch))
        report = json.loads((candidates[0].file.parent / EXPORT_REPORT).read_text())
        rows = [row for row in report["read_back"] if row["codes_differing"] is not None]
        found["read_back"] = {
            "codes": sum(row["values"] for row in rows),
            "codes_differing": sum(row["codes_differing"] for row in rows),
            "scales_differing": sum(row["scales_differing"] for row in rows),
            "weights_differing": sum(row["weights_differing"] for row in report["read_back"]),
        }
        with TorchRunner(opened.model) as runner:
            reference = losses(runner, plain)
        found["torch"] = {"perplexity": math.exp(float(reference.mean()))}
        found["files"] = {each.name: measured(each, plain, reference, opened) for each in candidates}
        found["speed"] = speeds(candidates)
    out = HERE / "results" / f"export-gguf-{name}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def made(compressed: str, dense: str, scratch: Path) -> list[Candidate]:
    """Our export, and llmcompress's dense export as llama.cpp's quantizer rounds it."""
    from cyllama.llama import llama_cpp
    from gguf import GGMLQuantizationType, LlamaFileType

    export(compressed, "gguf", scratch / "ours", run=False)
    export(dense, "gguf", scratch / "dense", run=False)
    found = [Candidate(OURS, scratch / "ours" / "model.gguf")]
    for title, kind, table in (
        ("llama.cpp Q4_0", "MOSTLY_Q4_0", None),
        ("llama.cpp Q4_0, table Q8_0", "MOSTLY_Q4_0", "Q8_0"),
        ("llama.cpp Q4_K_M", "MOSTLY_Q4_K_M", None),
    ):
        settings = llama_cpp.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread = int(LlamaFileType[kind]), 1
        if table is not None:
            settings.token_embedding_type = settings.output_tensor_type = int(GGMLQuantizationType[table])
        file = scratch / f"{len(found)}.gguf"
        llama_cpp.model_quantize(str(scratch / "dense" / "model.gguf"), str(file), settings)
        found.append(Candidate(title, file))
    return found


def measured(candidate: Candidate, plain: Tensor, reference: Tensor, opened: Exportable) -> dict[str, object]:
    """Perplexity beside PyTorch's of the compressed model, window by window."""
    with RUNNERS["llama_cpp"].open(str(candidate.file), device=CPU, dtype=torch.float32) as runner:
        found = losses(runner, plain)
        apart = (found - reference).mean(1)
        error = float(apart.std() / math.sqrt(len(apart)))
        halves = second_half(runner, plain, opened) if candidate.name == OURS else {}
    return {
        "bytes": candidate.file.stat().st_size,
        "perplexity": math.exp(float(found.mean())),
        "ratio_to_torch": math.exp(float(apart.mean())),
        "standard_error": error,
        **halves,
    }


def second_half(runner: Runner, plain: Tensor, opened: Exportable) -> dict[str, object]:
    """By the protocol of llama-perplexity, in llama.cpp and in PyTorch."""
    bos = opened.tokenizer.bos_token_id
    begins = opened.tokenizer("a")["input_ids"][0] == bos
    begun = plain.clone()
    if begins:
        begun[:, 0] = bos
    with TorchRunner(opened.model) as reference:
        both = {"second_half": losses(runner, begun), "second_half_torch": losses(reference, begun)}
    means = {name: float(each[:, WINDOW // 2 - 1 :].mean()) for name, each in both.items()}
    return {"second_half_bos": begins, **{name: math.exp(mean) for name, mean in means.items()}}


def losses(runner: Runner, windows_BT: Tensor) -> Tensor:
    """B×(T-1), in nats."""
    found = []
    for window_T in windows_BT:
        scores_TV = runner.logits(window_T[None])[0, :-1].float().log_softmax(-1)
        found.append(-scores_TV.gather(-1, window_T[1:, None]).squeeze(-1).double())
    return torch.stack(found)


def speeds(candidates: list[Candidate]) -> dict[str, dict[str, float]]:
    """Tokens per second, medians over turns in which every file runs once."""
    prompt_BT = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill: dict[str, list[float]] = {each.name: [] for each in candidates}
    decode: dict[str, list[float]] = {each.name: [] for each in candidates}
    for _ in range(TURNS):
        for each in candidates:
            with RUNNERS["llama_cpp"].open(str(each.file), device=CPU, dtype=torch.float32) as runner:
                list(runner.stream(prompt_BT, max_new_tokens=2))
                begun = time.perf_counter()
                steps = runner.stream(prompt_BT, max_new_tokens=NEW)
                next(steps)
                first = time.perf_counter()
                list(steps)
                prefill[each.name].append(PROMPT / (first - begun))
                decode[each.name].append((NEW - 1) / (time.perf_counter() - first))
    return {
        name: {"prefill": statistics.median(prefill[name]), "decode": statistics.median(decode[name])}
        for name in prefill
    }


if __name__ == "__main__":
    main()
