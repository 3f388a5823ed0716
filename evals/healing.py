"""How much of what pruning costs comes back, by tokens of training: KL from the dense model against cross-entropy.

    OMP_NUM_THREADS=1 python evals/healing.py --model FOLDER --text books=train.txt,test.txt \\
        --text WikiText-2=valid.txt,test.txt --out FOLDER --name SmolLM2-135M-Instruct

The model loses a quarter of its blocks' parameters, in depth and in width, as by the preset `shrink-25-heal`. Every
training reads one text and is measured on the test part of all of them: on the other kind nothing was trained or
chosen. KL and cross-entropy read the same windows in the same order with the same settings. A point of the curve is
the perplexity in the middle of one training (its learning rate falls to zero at the end only), so early points are
lower bounds of what a shorter training reaches.

Recovered is (log ppl pruned - log ppl healed) ÷ (log ppl pruned - log ppl dense). OUT keeps the pruned model and the
state of every training: a stopped program goes on.

N = windows, T = tokens.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress import compress
from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.passes.distillation.named_objectives import combined
from llmcompress.progress import Silent
from llmcompress.run import Run
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Callback, Job
from llmcompress.training.loop import train
from llmcompress.training.objectives.base import Objective
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.objectives.hidden_states import HiddenStates
from llmcompress.training.objectives.kl import KL
from llmcompress.training.settings import Training
from llmcompress.training.teacher import ModelTeacher

EVALS = Path(__file__).resolve().parent
CPU = torch.device("cpu")
PRUNING = [{"depth": {"fraction": 0.125, "score": "block_influence"}}, {"width": {"fraction": 0.145, "round_to": 32}}]
OBJECTIVES: dict[str, Objective] = {
    "kl": KL(),
    "cross_entropy": CrossEntropy(),
    "kl + hidden_states (kept)": combined([KL(), HiddenStates(layers="kept", factor=0.1)]),
}


class Milestones(Callback):
    """Measures after some of the steps, and writes what it found at once."""

    def __init__(self, bench: Bench, row: dict[str, Any], model: PreTrainedModel, at: frozenset[int]) -> None:
        self._bench, self._row, self._model, self._at = bench, row, model, at

    def after_step(self, step: int) -> bool:
        """Every point once: a resumed training repeats the steps since its last save."""
        if step in self._at and str(step) not in self._row["points"]:
            self._row["points"][str(step)] = self._bench.measured(self._model)
            self._bench.write()
        return False


class Bench:
    """The texts, the models, and the file of results."""

    def __init__(self, model: Path, texts: dict[str, tuple[Path, Path]], path: Path, facts: dict[str, Any]) -> None:
        self._model, self._texts, self._path = model, texts, path
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = all(known.get(key) == value for key, value in facts.items())
        self.told: dict[str, Any] = known if same else {**facts, "rows": {}}
        self.told |= {"machine": machine(), "versions": versions()}
        self.tokenizer: PreTrainedTokenizerBase = load_for_compression(find_source(str(model))).tokenizer

    def loaded(self, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """In float32, unless asked otherwise."""
        return load_for_compression(find_source(str(folder)), dtype=dtype).model

    def teacher(self, dtype: torch.dtype) -> ModelTeacher:
        """The dense model, loaded when it is needed."""
        return ModelTeacher(lambda: self.loaded(self._model, dtype), CPU)

    def windows(self, text: str, count: int, tokens: int) -> Tensor:
        """N×T of the training part of a text."""
        settings = Calibration(source=str(self._texts[text][0]), samples=count, tokens=tokens)
        made = calibration_windows(settings, self.tokenizer, max_positions=tokens, seed=0, progress=Silent())
        return made.windows_NT

    def measured(self, model: PreTrainedModel) -> dict[str, float]:
        """Log-perplexity on the test part of every text; window 512, BOS."""
        found = {}
        for name, (_, test) in self._texts.items():
            task = PerplexityTask(source=str(test), window=512, bos="always", max_windows=self.told["windows"])
            result = perplexity(model, self.tokenizer, task, device=CPU, progress=Silent())
            found[name] = math.log(result.perplexity)
        return found

    def write(self) -> None:
        """All rows, those of other trainings too."""
        self._path.write_text(json.dumps(self.told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--text", "texts", multiple=True, required=True, help="NAME=TRAIN,TEST")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="work that can be resumed")
@click.option("--name", required=True, help="of the model")
@click.option("--run", default="", help="behind the model's name in that of the result, where settings differ")
@click.option("--steps", default=256, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--tokens", default=512, show_default=True, help="of a window")
@click.option("--learning-rate", default=3e-4, show_default=True)
@click.option("--mixed-precision", type=click.Choice(["bf16"]), help="of the student; the teacher is in bfloat16 then")
@click.option("--points", default=8, show_default=True, help="of a curve, besides its beginning")
@click.option("--windows", default=20, show_default=True, help="of every test text")
@click.option("--only", multiple=True, help="TEXT/OBJECTIVE; several may be given")
def main(
    model: Path,
    texts: tuple[str, ...],
    out: Path,
    name: str,
    run: str,
    steps: int,
    batch: int,
    tokens: int,
    learning_rate: float,
    mixed_precision: Literal["bf16"] | None,
    points: int,
    windows: int,
    only: tuple[str, ...],
) -> None:
    """Measure what is not there yet."""
    named = {each.partition("=")[0]: each.partition("=")[2].split(",") for each in texts}
    pairs = {each: (Path(parts[0]), Path(parts[1])) for each, parts in named.items()}
    settings = Training(
        steps=steps, batch=batch, learning_rate=learning_rate, mixed_precision=mixed_precision,
        save_every=max(1, steps // 32),
    )  # fmt: skip
    facts = {
        "model": name, "pruning": PRUNING, "training": settings.model_dump(mode="json"), "tokens": tokens,
        "windows": windows,
    }  # fmt: skip
    bench = Bench(model, pairs, EVALS / "results" / f"healing-{'-'.join(filter(None, (name, run)))}.json", facts)
    pruned = out / "pruned"
    if not pruned.exists():
        first = next(iter(pairs.values()))[0]
        recipe = {
            "calibration": {"source": str(first), "samples": 32, "tokens": 512},
            "passes": PRUNING,
            "evaluate": {},
        }
        compress(str(model), recipe, pruned)
    for row, folder in (("dense", model), ("pruned", pruned)):
        if row not in bench.told:
            bench.told[row] = bench.measured(bench.loaded(folder))
            bench.write()
    at = frozenset(round(steps * 2.0**-back) for back in range(points)) | {steps}
    for text in pairs:
        for objective in OBJECTIVES:
            title = f"{text}/{objective}"
            row = bench.told["rows"].setdefault(title, {"points": {}, "seconds": 0.0})
            if (only and title not in only) or str(steps) in row["points"]:
                continue
            began = time.perf_counter()
            student, teaches = bench.loaded(pruned), OBJECTIVES[objective].needs_teacher()
            data = Windows(bench.windows(text, steps * batch, tokens))
            with Run.open(
                out / title.replace("/", "-"), fingerprint=_fingerprint(facts), lock_text="", fresh=False
            ) as opened:
                train(
                    student, data, settings, RunContext(torch.zeros(0, 1, dtype=torch.long), keep=opened),
                    objective=OBJECTIVES[objective], teacher=bench.teacher(settings.frozen_dtype) if teaches else None,
                    job=Job("heal", callback=Milestones(bench, row, student, at)),
                )  # fmt: skip
            row["seconds"] += time.perf_counter() - began
            bench.write()
            click.echo(f"{title}: {_recovered(bench.told, row['points'][str(steps)])}")


def _fingerprint(facts: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in facts.items()}


def _recovered(told: dict[str, Any], found: dict[str, float]) -> dict[str, float]:
    """Share of the lost log-perplexity that is back, on every text."""
    dense, pruned = told["dense"], told["pruned"]
    return {text: round((pruned[text] - value) / (pruned[text] - dense[text]), 3) for text, value in found.items()}


if __name__ == "__main__":
    main()
