"""Tasks on a real model: dense beside published figures, a compressed one with its flips, and lm-eval's own class.

    OMP_NUM_THREADS=1 python evals/tasks_table.py --model FOLDER --task-data FOLDER --calibration valid.txt \\
        --limit 100 --name SmolLM2-135M-Instruct

Zero-shot, without chat template, float32: as lm-eval's `hf` does with `dtype=float32`. The first documents of every
task only; the file says how many. Every task is answered in turns by our adapter and by lm-eval's `HFLM` (its default
batch size of 1) on the same model in the same process: `seconds` are CPU seconds of both. Writes
evals/results/tasks-NAME.json after every task.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from lm_eval.evaluator import evaluate as evaluate_by_lm_eval
from lm_eval.models.huggingface import HFLM

import llmcompress
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.metrics.base import Metric, Subject
from llmcompress.evaluation.metrics.generations import GenerationMetric
from llmcompress.evaluation.metrics.robustness import RobustnessMetric
from llmcompress.evaluation.paired import interval
from llmcompress.evaluation.settings.generations import GenerationSettings
from llmcompress.evaluation.settings.robustness import RobustnessSettings
from llmcompress.evaluation.settings.tasks import TaskSettings
from llmcompress.evaluation.tasks.answering import answer
from llmcompress.evaluation.tasks.comparing import task_comparisons
from llmcompress.evaluation.tasks.definitions import TaskLoader
from llmcompress.evaluation.tasks.observation import TaskAnswers, TaskObservation
from llmcompress.loading.load import load
from llmcompress.progress import Silent
from llmcompress.runners.torch_runner import TorchRunner

EVALS = Path(__file__).resolve().parent

PUBLISHED = {
    "local_arc_easy": ("acc", 0.541),
    "local_arc_challenge": ("acc_norm", 0.277),
    "local_piqa": ("acc_norm", 0.669),
}
"""Of SmolLM2-135M-Instruct by lm-eval, 0-shot, from the original bfloat16 weights."""

PASSES = {"gptq int4_g64": [{"gptq": {"scheme": "int4_g64"}}]}

_TEXTS = {"texts": {"__all__": {"prompt"}}}
"""Of the generated texts the prompts are in evals/prompts."""

SAMPLES, TOKENS = 32, 512
"""Calibration windows and their length."""


@click.command()
@click.option("--model", required=True, help="Folder of the dense model.")
@click.option("--task-data", required=True, help="Folder with mc/arc_easy_test.jsonl and so on.")
@click.option("--calibration", required=True, help="Text that no task is made from.")
@click.option("--limit", type=int, help="Documents per task [default: all].")
@click.option(
    "--own-limit", type=int, default=50, show_default=True, help="Documents that lm-eval's class answers too."
)
@click.option("--name", required=True, help="Of the file in evals/results.")
def main(model: str, task_data: str, calibration: str, limit: int | None, own_limit: int, name: str) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    loader, settings = TaskLoader(), {}
    for task in PUBLISHED:
        asked = TaskSettings(task=task, data=task_data, limit=limit)
        settings[task] = (asked, loader.load(task, data=task_data))
    file = EVALS / "results" / f"tasks-{name}.json"
    found: dict[str, Any] = {
        "model": name,
        "limit": limit,
        "calibration": {"source": Path(calibration).name, "samples": SAMPLES, "tokens": TOKENS},
        "versions": {**versions(), "lm-eval": _lm_eval_version()},
        "machine": machine(),
        "tasks": {},
        "behaviour": {},
        "against_lm_eval": {},
    }
    bundle = load(model, dtype=torch.float32, device=torch.device("cpu"))
    dense: dict[str, TaskObservation] = {}
    with TorchRunner(bundle.model) as runner:
        for task, (asked, loaded) in settings.items():
            short = asked.model_copy(update={"limit": own_limit})
            found["against_lm_eval"][task] = _against_lm_eval(runner, bundle, loaded, short)
            seconds, dense[task] = _timed(_answers, runner, bundle, loaded, asked)
            answers = dense[task].tasks[0]
            found["tasks"][task] = {
                "dense": {**_row(answers), "published": _published(task, answers), "cpu_seconds": seconds}
            }
            _write(file, found)
        others = _others(task_data, bundle)
        observed = [metric.observe(runner, Silent(), dense=None) for metric in others]
    for label, passes in PASSES.items():
        recipe = {"passes": passes, "evaluate": {}}
        recipe["calibration"] = {"source": calibration, "samples": SAMPLES, "tokens": TOKENS}
        small = llmcompress.compress(model, recipe)
        with TorchRunner(small.model.float()) as runner:
            for task, (asked, loaded) in settings.items():
                own = _answers(runner, bundle, loaded, asked)
                (comparison,) = task_comparisons(dense[task], own)
                found["tasks"][task][label] = {**_row(own.tasks[0]), "against_dense": comparison.model_dump()}
                _write(file, found)
            found["behaviour"][label] = []
            for metric, before in zip(others, observed, strict=True):
                after = metric.observe(runner, Silent(), dense=before)
                records = [*metric.results(before, "dense"), *metric.results(after, "compressed")]
                records += metric.compared(before, after)
                found["behaviour"][label] += [each.model_dump(mode="json", exclude=_TEXTS) for each in records]
                _write(file, found)


def _against_lm_eval(runner: TorchRunner, bundle: Any, loaded: Any, asked: TaskSettings) -> dict[str, Any]:
    """Both on the same documents, twice in turns; the lower time of each."""
    theirs_lm = HFLM(pretrained=bundle.model, tokenizer=bundle.tokenizer, batch_size=1)
    ours_seconds, theirs_seconds = [], []
    for _ in range(2):
        seconds, ours = _timed(_answers, runner, bundle, loaded, asked)
        ours_seconds.append(seconds)
        seconds, theirs = _timed(
            evaluate_by_lm_eval, theirs_lm, {"tasks": dict(loaded.tasks)}, limit=asked.limit, bootstrap_iters=0
        )
        theirs_seconds.append(seconds)
    samples = theirs["samples"][asked.task]
    answers = ours.tasks[0].answers
    metrics = sorted(answers[0].scores)
    return {
        "documents": len(answers),
        "same_scores": all(
            own.scores[metric] == sample[metric]
            for own, sample in zip(answers, samples, strict=True)
            for metric in metrics
        ),
        "ours_cpu_seconds": min(ours_seconds),
        "lm_eval_cpu_seconds": min(theirs_seconds),
        "ratio": min(ours_seconds) / min(theirs_seconds),
    }


def _row(found: TaskAnswers) -> dict[str, Any]:
    return {
        "documents": len(found.answers),
        "scores": {each.metric: [each.value, each.standard_error] for each in found.scores},
    }


def _published(task: str, found: TaskAnswers) -> dict[str, Any]:
    """Whether it lies within the 95 % interval of ours."""
    metric, published = PUBLISHED[task]
    ours = interval(found.values(metric) or [])
    assert ours.low is not None and ours.high is not None
    within = ours.low <= published <= ours.high
    return {"metric": metric, "value": published, "ours": ours.model_dump(), "within": within}


def _others(task_data: str, bundle: Any) -> list[Metric]:
    """Robustness and generated texts: few items, for the order of magnitude."""
    config = bundle.model.config
    subject = Subject(bundle.tokenizer, config.max_position_embeddings, config.vocab_size)
    robustness = [
        RobustnessSettings(task="local_arc_easy", data=task_data, limit=20, prompts=()),
        RobustnessSettings(text="builtin:evaluation", limit=8),
    ]
    generations = [GenerationSettings(max_new_tokens=48)]
    return [*RobustnessMetric.prepare(robustness, subject), *GenerationMetric.prepare(generations, subject)]


def _answers(runner: TorchRunner, bundle: Any, loaded: Any, asked: TaskSettings) -> TaskObservation:
    return answer(runner, bundle.tokenizer, loaded, asked, progress=Silent())


def _timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    start = time.process_time()
    found = work(*arguments, **options)
    return time.process_time() - start, found


def _lm_eval_version() -> str:
    from importlib.metadata import version

    return version("lm-eval")


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
