"""Measures gptq straight onto llama.cpp's own types beside llama.cpp's quantizer, at the same types and bytes.

    python evals/kquants.py --dense SmolLM2-135M-Instruct --calibration books/train.txt --folders work \
        --text WikiText-2=wikitext-2/test.txt --text books=books/test.txt

For each mixture of llama.cpp (Q4_0 with an 8-bit table, Q4_K_M) its quantizer rounds the dense export by default,
without an importance matrix. The type of every tensor of that file becomes the scheme of the same linear in a recipe:
`gptq` with `range: joint`, the table by `embeddings`. So both files hold the same types and weigh the same; only codes
and scales differ. All are run by llama.cpp on the same windows of 512 tokens, without BOS; differences of the mean loss
are paired, with the standard error over windows. Calibration text is none of the test texts. Everything is written to
evals/results/kquants-NAME.json. Folders are kept: a second run goes on.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from torch import Tensor

import llmcompress
from llmcompress.evaluation.environment import machine, versions
from llmcompress.exporters.gguf import FILE
from llmcompress.reopening import reopen
from llmcompress.runners.base import RUNNERS

HERE = Path(__file__).resolve().parent
WINDOW = 512
CPU = torch.device("cpu")
SCHEMES = {
    **{f"Q{bits}_K": f"q{bits}_k" for bits in range(2, 7)},
    **{"Q4_0": "int4_g32", "Q5_0": "int5_g32", "Q5_1": "int5_g32_asym", "Q8_0": "int8_g32"},
}
LINEARS = {
    **{f"attn_{each}": f"self_attn.{each}_proj" for each in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Mixture:
    """What llama.cpp's quantizer is asked for."""

    name: str
    type: str
    table: str | None = None


MIXTURES = (Mixture("Q4_K_M", "MOSTLY_Q4_K_M"), Mixture("Q4_0", "MOSTLY_Q4_0", "Q8_0"))


@click.command()
@click.option("--dense", required=True, help="The dense model: a folder.")
@click.option("--calibration", required=True, help="A text file.")
@click.option("--folders", required=True, type=click.Path(path_type=Path), help="Where files are kept.")
@click.option("--text", "texts", required=True, multiple=True, metavar="NAME=FILE")
@click.option("--samples", default=24, show_default=True)
@click.option("--windows", default=10, show_default=True)
@click.option("--name", default="SmolLM2-135M-Instruct", show_default=True)
def main(
    dense: str, calibration: str, folders: Path, texts: tuple[str, ...], samples: int, windows: int, name: str
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    tokenizer = reopen(dense).tokenizer
    settings = {"source": calibration, "samples": samples, "tokens": WINDOW}
    found: dict[str, Any] = {
        **{"versions": versions(), "machine": machine(), "window": WINDOW, "windows": windows, "bos": False},
        **{"calibration": {"text": Path(calibration).name, "samples": samples, "tokens": WINDOW}, "mixtures": {}},
    }
    read = {}
    for text in texts:
        label, _, path = text.partition("=")
        content = Path(path).read_text(encoding="utf-8")[: windows * WINDOW * 8]
        ids = tokenizer(content, add_special_tokens=False)["input_ids"]
        read[label] = torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)
    whole = _exported(dense, folders / "dense")
    for mixture in MIXTURES:
        theirs = _rounded_by_llama_cpp(whole, folders / f"{mixture.name}.gguf", mixture)
        ours = _rounded_by_us(dense, folders / f"ours-{mixture.name}", theirs, settings)
        assert _types(ours) == _types(theirs), (_types(ours), _types(theirs))
        found["mixtures"][mixture.name] = {
            "types": _types(ours),
            "bytes": {"llama_cpp": theirs.stat().st_size, "gptq": ours.stat().st_size},
            "texts": {label: _compared(theirs, ours, windows_BT) for label, windows_BT in read.items()},
        }
        _write(found, name)
    found["dense"] = {label: math.exp(float(_losses(whole, windows_BT).mean())) for label, windows_BT in read.items()}
    _write(found, name)


def _write(found: dict[str, Any], name: str) -> None:
    """After every mixture: the next one may be stopped."""
    (HERE / "results" / f"kquants-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1), flush=True)


def _exported(folder: str | Path, output: Path) -> Path:
    if not output.exists():
        llmcompress.export(str(folder), "gguf", output, run=False)
    return output / FILE


def _rounded_by_llama_cpp(dense: Path, file: Path, mixture: Mixture) -> Path:
    from cyllama.llama import llama_cpp

    if not file.exists():
        settings = llama_cpp.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread = int(LlamaFileType[mixture.type]), 1
        if mixture.table is not None:
            settings.token_embedding_type = settings.output_tensor_type = int(GGMLQuantizationType[mixture.table])
        llama_cpp.model_quantize(str(dense), str(file), settings)
    return file


def _rounded_by_us(dense: str, folder: Path, theirs: Path, calibration: dict[str, Any]) -> Path:
    """The same types, by `gptq`."""
    named = {
        str(each.name): SCHEMES[each.tensor_type.name]
        for each in GGUFReader(theirs).tensors
        if "_norm" not in each.name
    }
    table = named.pop("token_embd.weight")
    most = Counter(named.values()).most_common(1)[0][0]
    sites = {_site(tensor): {"scheme": scheme} for tensor, scheme in named.items() if scheme != most}
    gptq = {"scheme": most, "range": "joint", "overrides": sites}
    recipe = {
        "calibration": calibration,
        "passes": [{"gptq": gptq}, {"embeddings": {"embedding": table, "head": table}}],
        "save": {"format": "llmcompress"},
    }
    if not folder.exists():
        llmcompress.compress(dense, recipe, folder)
    return _exported(folder, folder.with_name(f"{folder.name}-gguf"))


def _site(tensor: str) -> str:
    _, block, kind, _ = tensor.split(".")
    return f"model.layers.{block}.{LINEARS[kind]}"


def _types(file: Path) -> dict[str, int]:
    """Tensors of every type."""
    return dict(sorted(Counter(each.tensor_type.name for each in GGUFReader(file).tensors).items()))


def _compared(theirs: Path, ours: Path, windows_BT: Tensor) -> dict[str, float]:
    """Perplexities, and the difference of the mean losses, window by window."""
    before, after = (_losses(file, windows_BT).mean(1) for file in (theirs, ours))
    apart = after - before
    return {
        "llama_cpp": math.exp(float(before.mean())),
        "gptq": math.exp(float(after.mean())),
        "difference": float(apart.mean()),
        "standard_error": float(apart.std() / math.sqrt(len(apart))),
    }


def _losses(file: Path, windows_BT: Tensor) -> Tensor:
    """B×(T-1), in nats."""
    found = []
    with RUNNERS["llama_cpp"].open(str(file), device=CPU, dtype=torch.float32) as runner:
        for window_T in windows_BT:
            scores_TV = runner.logits(window_T[None])[0, :-1].float().log_softmax(-1)
            found.append(-scores_TV.gather(-1, window_T[1:, None]).squeeze(-1).double())
    return torch.stack(found)


if __name__ == "__main__":
    main()
