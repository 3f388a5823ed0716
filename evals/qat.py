"""Quantization-aware training on a real model beside the best post-training result, at a stated token budget.

    OMP_NUM_THREADS=1 python evals/qat.py --training wikitext-2/valid.txt --text WikiText-2=wikitext-2/test.txt \\
        --text books=books/test.txt
    OMP_NUM_THREADS=1 python evals/qat.py --small --training books/valid.txt --text books=books/test.txt

Rows of `REAL` are made in order: block by block (`efficient_qat`), then the same model trained end to end (`qat`).
Every row is written to evals/results/qat-NAME.json as soon as it is done, with the losses of every window, and is not
made again; a program that was stopped goes on in the middle of a row. The post-training rows are those of
`real_trials.py`: same model, same test windows, so differences are paired. `--small`: objectives and phases on the
bundled model, three draws of the training text. Training text is never test text, and no setting was chosen on the
test text. `--long wikitext-2/valid.txt --long books/train.txt` makes the rows of half a million tokens, too: both kinds
shuffled, in bfloat16. Set OMP_NUM_THREADS=1: seconds are CPU seconds. `--folders`: the models are saved there too, the
token embedding as the preset of these bits has it; `headline.py --trained` evaluates them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import torch
import yaml
from real_model import NAME, real_model
from real_trials import Results, named
from study import Bench, Study, Trial, calibration_draw, stored_bytes
from torch import Tensor

import llmcompress
from llmcompress.calibration.context import RunContext
from llmcompress.exporters.save import save_model
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.run import Run
from llmcompress.storage.folder import run_folder
from llmcompress.storage.paths import cache_folder

HERE = Path(__file__).resolve().parent
SMALL = Path(llmcompress.__file__).parent / "builtin" / "books-llama"


class Row(NamedTuple):
    """What is measured: passes, and how many windows of text they see."""

    setting: str
    method: str
    passes: tuple[dict[str, dict[str, Any]], ...]
    windows: int
    draws: int = 1
    table_in_8_bits: bool = False
    """In the folder that is saved."""
    long_windows: int = 0
    """Of every text of `--long`, at most, for the last pass; 0: it sees what the others see."""
    mixed_precision: Literal["bf16"] | None = None
    """What blocks multiply in before the last pass."""


def blockwise(scheme: str, steps: int, rate: float) -> dict[str, dict[str, Any]]:
    """EfficientQAT's first phase, from GPTQ's codes."""
    return {
        "efficient_qat": {
            "scheme": scheme,
            "quantizer": {"gptq": {"range": "joint"}},
            "steps": steps,
            "rate": rate,
            "scale_rate": rate / 5,
        }
    }


def post_training(scheme: str) -> dict[str, dict[str, Any]]:
    """GPTQ's codes."""
    return {"gptq": {"scheme": scheme, "range": "joint"}}


BATCH = 4


def end_to_end(steps: int, rate: float, **options: Any) -> dict[str, dict[str, Any]]:
    """QAD: plain KL to the dense model."""
    training = {"steps": steps, "batch": BATCH, "learning_rate": rate, "save_every": max(1, steps // 8)}
    return {"qat": {"training": training, **options}}


def learned_codes(scheme: str) -> dict[str, dict[str, Any]]:
    """GSQ's codes, at the rate that two bits want."""
    return {"gsq": {"scheme": scheme, "rate": 0.012, "quantizer": {"gptq": {"range": "joint"}}}}


def long_end_to_end(steps: int, rate: float) -> dict[str, dict[str, Any]]:
    """The same in bfloat16, which is several times as fast where the processor multiplies in it."""
    (qat,) = end_to_end(steps, rate).values()
    return {"qat": {"training": {**qat["training"], "save_every": 30, "mixed_precision": "bf16"}}}


LONG = "gptq, qat on two texts"
TWO, THREE = blockwise("int2_g64", 96, 0.015), blockwise("int3_g64", 64, 0.015)
REAL = (
    Row("int2_g64", "efficient_qat", (TWO,), 48),
    Row("int3_g64", "efficient_qat", (THREE,), 48),
    Row("int2_g64", "efficient_qat, qat", (TWO, end_to_end(16, 1e-3)), 48, table_in_8_bits=True),
    Row("int3_g64", "efficient_qat, qat", (THREE, end_to_end(16, 3e-4)), 48, table_in_8_bits=True),
    Row("int4_g64", "gptq, qat", (post_training("int4_g64"), end_to_end(8, 1e-4)), 48),
    Row("int8_g64", "gptq, qat", (post_training("int8_g64"), end_to_end(8, 3e-5)), 48),
    *(
        Row(scheme, LONG, (post_training(scheme), long_end_to_end(240, 2e-4)), 48, long_windows=1440)
        for scheme in ("int3_g64", "int2_g64")
    ),
    Row(
        "int2_g64",
        "gsq, qat on two texts",
        (learned_codes("int2_g64"), long_end_to_end(240, 5e-4)),
        48,
        table_in_8_bits=True,
        long_windows=1440,
        mixed_precision="bf16",
    ),
)


def small(scheme: str) -> tuple[Row, ...]:
    """Phases and objectives from one start each, on the same text."""
    gptq = post_training(scheme)
    labels = {"objective": {"cross_entropy": {}}}
    first = blockwise(scheme, 256, 0.015)
    methods = {
        "gptq": (gptq,),
        "gsq": ({"gsq": {"scheme": scheme, "rate": 0.012, "quantizer": {"gptq": {"range": "joint"}}}},),
        "gsq, 256 steps": (
            {"gsq": {"scheme": scheme, "rate": 0.012, "steps": 256, "quantizer": {"gptq": {"range": "joint"}}}},
        ),
        "efficient_qat": (first,),
        "efficient_qat, step sizes on KL": (first, end_to_end(100, 3e-4, train=["scales"])),
        "efficient_qat, step sizes on labels": (first, end_to_end(100, 3e-4, train=["scales"], **labels)),
        "efficient_qat, qat": (first, end_to_end(100, 3e-4)),
        "gptq, qat": (gptq, end_to_end(200, 1e-3)),
        "gptq, qat from the middle of codes": (gptq, end_to_end(200, 1e-3, start="codes")),
        "gptq, qat on labels": (gptq, end_to_end(200, 1e-3, **labels)),
        "gptq, straight-through": (gptq, end_to_end(200, 1e-3, train=["weights"])),
    }
    return tuple(Row(scheme, name, passes, 128, draws=3) for name, passes in methods.items())


def small_and_plain(scheme: str) -> tuple[Row, ...]:
    """Before and after a training, where post-training loses little."""
    gptq = post_training(scheme)
    return Row(scheme, "gptq", (gptq,), 128), Row(scheme, "gptq, qat", (gptq, end_to_end(100, 1e-4)), 128)


@click.command()
@click.option("--small", "is_small", is_flag=True, help="the bundled model, and rows of its own")
@click.option("--model", type=Path, help="folder; default: the one that real_model.py makes")
@click.option("--name", default=NAME, show_default=True, help="of the result file")
@click.option("--training", type=Path, required=True, help="file")
@click.option("--text", "texts", multiple=True, required=True, help="NAME=FILE, reported")
@click.option("--long", "long", multiple=True, type=Path, help="FILE: training part of one kind of text")
@click.option("--only", multiple=True, help="setting, or setting/method")
@click.option("--runs", type=Path, help="keeps unfinished work; default: in the cache")
@click.option("--folders", type=Path, help="saves every model that is made")
def main(
    is_small: bool,
    model: Path | None,
    name: str,
    training: Path,
    texts: Sequence[str],
    long: Sequence[Path],
    only: Sequence[str],
    runs: Path | None,
    folders: Path | None,
) -> None:
    """Do what is missing."""
    cache = cache_folder() / "evals"
    if is_small:
        study, name = Study(SMALL, training, named(texts), {}, cache, tokens=128, window=256, windows=40), SMALL.name
        rows = (*small("int2_g32"), *small("int3_g32"), *small_and_plain("int4_g32"), *small_and_plain("int8_g32"))
    else:
        study, rows = Study(model or real_model(), training, named(texts), {}, cache), REAL
    results = Results(HERE / "results" / f"qat-{name}.json", replace(study, samples=rows[0].windows))
    bench = Bench(study)
    for draw in range(max(row.draws for row in rows)):
        for row in rows:
            key = {"setting": row.setting, "method": row.method, "draw": draw}
            wanted = not only or row.setting in only or f"{row.setting}/{row.method}" in only
            if row.long_windows and not long:
                continue
            if draw < row.draws and wanted and not any(key.items() <= trial.items() for trial in results.trials):
                run = (runs or cache) / f"qat-{name}-{row.setting}-{draw}"
                trial = {**key, **made(bench, row, draw, run, folder_of(folders, row.setting, row.method), long)}
                results.add(bench, trial)
                click.echo(f"{row.setting:10s} {row.method:36s} {draw} {shown(trial)}", err=True)
    click.echo(str(results.path))


def folder_of(folders: Path | None, setting: str, method: str) -> Path | None:
    """Where a model is saved."""
    return folders and folders / f"{setting}-{method.replace(', ', '-')}"


def made(bench: Bench, row: Row, draw: int, folder: Path, saved: Path | None, long: Sequence[Path] = ()) -> Trial:
    """One row; a first stage that an earlier row had is not made again."""
    study = replace(bench.study, samples=row.windows)
    windows_NT = study.calibration_windows(draw)
    folder = _begun(folder, row)
    loaded = study.loaded()
    bench.map = bench.map or map_model(loaded.model)
    passes = parse_recipe(yaml.safe_dump({"passes": list(row.passes)}), "evals").passes
    clock = folder.with_suffix(".seconds")
    spent = float(clock.read_text()) if clock.exists() else 0.0
    began = time.process_time()
    try:
        with Run.open(folder, fingerprint={}, lock_text="", fresh=False) as run:
            context = RunContext(
                windows_NT,
                batch=8,
                seed=draw,
                storage_dtype=loaded.preflight.storage_dtype,
                keep=run,
                teachers=TeacherFiles(str(study.model)),
                progress=Silent(),
            )
            compressed, trained_on = loaded.model, windows_NT.numel()
            if row.long_windows:
                # what comes before is done again after a kill: minutes
                before = replace(context, keep=None, mixed_precision=row.mixed_precision)
                compressed, _ = apply_passes(compressed, bench.map, passes[:-1], before)
                context = replace(context, windows_NT=shuffled(study, long, row.long_windows, draw))
                trained_on = row.passes[-1]["qat"]["training"]["steps"] * BATCH * study.tokens
                passes = passes[-1:]
            compressed, _ = apply_passes(compressed, map_model(compressed), passes, context)
    finally:
        seconds = spent + time.process_time() - began
        clock.write_text(f"{seconds:.1f}")
    found = {
        "cpu_seconds": round(seconds, 1),
        "training_tokens": trained_on,
        "passes": list(row.passes),
        "texts": bench.measure(compressed, list(study.texts)),
        "dense_nats": {name: dense_nats(bench, name) for name in study.texts},
        "bytes": stored_bytes(compressed),
    }
    if saved is not None:
        dtype = loaded.preflight.storage_dtype
        if row.table_in_8_bits:
            last = parse_recipe("passes: [embeddings: {}]", "evals").passes
            windowless = RunContext(windows_NT[:0], storage_dtype=dtype)
            compressed, _ = apply_passes(compressed, map_model(compressed), last, windowless)
        saved.mkdir(parents=True)
        save_model(compressed, saved, "auto", storage_dtype=dtype)
        loaded.tokenizer.save_pretrained(saved)
    return found


def shuffled(study: Study, texts: Sequence[Path], count: int, draw: int) -> Tensor:
    """N×T: at most so many windows of every text."""
    loaded = study.loaded()
    found_NT = torch.cat([calibration_draw(path, loaded, count, study.tokens, draw)[0] for path in texts])
    return found_NT[torch.randperm(len(found_NT), generator=torch.Generator().manual_seed(draw))]


def dense_nats(bench: Bench, name: str) -> float:
    """The dense model's loss on a text."""
    return round(-sum(float(each.logprob_P.sum(dtype=torch.float64)) for each in bench.text(name).windows), 1)


def _begun(folder: Path, row: Row) -> Path:
    """Where a row is made: with the first stage of the row that has only that, if it is there."""

    def place(count: int) -> Path:
        name = hashlib.sha256(json.dumps(row.passes[:count]).encode()).hexdigest()[:8]
        return folder.with_name(f"{folder.name}-{name}")

    first, own = place(1), place(len(row.passes))
    own.parent.mkdir(parents=True, exist_ok=True)
    if run_folder(first).exists() and not run_folder(own).exists():
        shutil.copytree(run_folder(first), run_folder(own))
        shutil.copy(first.with_suffix(".seconds"), own.with_suffix(".seconds"))
    return own


def shown(trial: Trial) -> str:
    """For people who wait."""
    sums = {name: sum(each["nats"]) for name, each in trial["texts"].items()}
    assert all(math.isfinite(total) for total in sums.values())
    return f"{trial['cpu_seconds']:.0f} s, nats {json.dumps({name: round(total, 1) for name, total in sums.items()})}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
