"""Runs tasks through lm-eval on any runner, and keeps every document's answer."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmcompress.errors import CompressError
from llmcompress.evaluation.paired import interval
from llmcompress.evaluation.settings.tasks import TaskSettings
from llmcompress.evaluation.tasks.definitions import WHERE, LoadedTasks, first_line
from llmcompress.evaluation.tasks.observation import Answer, TaskAnswers, TaskObservation, main_metric
from llmcompress.progress import Progress
from llmcompress.records.tasks import TaskDataset, TaskScore
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmcompress.evaluation.tasks.adapter import Edit

SEED, OTHER_SEED = 0, 1234
"""lm-eval's own: Python's generator; numpy's, torch's and that of the few-shot examples."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def answer(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    settings: TaskSettings,
    *,
    progress: Progress,
    edit: Edit | None = None,
) -> TaskObservation:
    """Answers of a model to loaded tasks, scored by lm-eval. `edit` changes each prompt before the model reads it.

    Raises: CompressError when a task cannot be run on this model.
    """
    from lm_eval import evaluator

    from llmcompress.evaluation.tasks.adapter import RunnerLM

    with seeded():
        for task in loaded.tasks.values():
            _set_shots(task, settings.shots)
        try:
            results = evaluator.evaluate(
                lm=RunnerLM(runner, tokenizer, progress=progress, edit=edit),
                task_dict={"tasks": dict(loaded.tasks)},
                limit=settings.limit,
                bootstrap_iters=0,  # lm-eval would start processes and print; means get their errors below
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )
        except CompressError:
            raise
        except ValueError as problem:  # a task that runs code from its data, needs images, has no examples to show
            what = f"lm-eval refuses {settings.task}: {first_line(problem)}"
            raise CompressError("tasks.refused", what, where=WHERE, fix="leave this task out") from problem
    answers = tuple(_task_answers(name, task, results, settings) for name, task in sorted(loaded.tasks.items()))
    return TaskObservation(tasks=answers, groups=dict(loaded.groups))


def _set_shots(task: Any, shots: int | None) -> None:
    """As lm-eval's `simple_evaluate` does: a task that says 0 stays at 0."""
    own = task.get_config("num_fewshot")
    if own != 0 and shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=OTHER_SEED)


def _task_answers(name: str, task: Any, results: Mapping[str, Any], settings: TaskSettings) -> TaskAnswers:
    samples = results["samples"][name]
    by_document: dict[int, dict[str, Any]] = defaultdict(dict)
    for sample in samples:
        by_document[sample["doc_id"]][sample["filter"]] = sample
    answers = tuple(_answer(task, by_document[number]) for number in sorted(by_document))
    better = results["higher_is_better"].get(name, {})
    scores = []
    for key, value in results["results"][name].items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = _label(metric, filtered)
        values = [each.scores[label] for each in answers if label in each.scores]
        # of a mean over documents; perplexities and the like are no means
        mean = interval(values) if len(values) == len(answers) else None
        error = mean.standard_error if mean and abs(mean.mean - value) < 1e-9 else None
        scores.append(
            TaskScore(
                metric=label, value=float(value), standard_error=error, higher_is_better=bool(better.get(metric, True))
            )
        )
    if not scores:
        what = f"{name}: lm-eval computed no number for this task"
        raise CompressError("tasks.no-score", what, where=WHERE, fix="leave this task out")
    holds = {each.metric: all(a.scores.get(each.metric) in (0.0, 1.0) for a in answers) for each in scores}
    return TaskAnswers(
        task=name,
        version=str(results["versions"].get(name)),
        limit=settings.limit,
        shots=int(results["n-shot"].get(name) or 0),
        chat_template=settings.chat_template,
        scores=tuple(scores),
        main=main_metric(holds),
        dataset=_dataset(task),
        answers=answers,
    )


def _dataset(task: Any) -> TaskDataset | None:
    """Of the Hub; tasks that read files have `json` or a folder there."""
    path, config = task.DATASET_PATH, task.config
    split = config.test_split if task.has_test_docs() else config.validation_split
    if not _HUB_ID.fullmatch(path or "") or (config.dataset_kwargs or {}).get("data_files") or not split:
        return None
    rows = (task.dataset or {}).get(split)
    if rows is None:
        return None
    return TaskDataset(path=path, config=task.DATASET_NAME or "default", split=split, rows=len(rows))


def _label(metric: str, filtered: str) -> str:
    """The filter of the answers is named only where it has a name."""
    return metric if filtered == "none" else f"{metric},{filtered}"


def _answer(task: Any, by_filter: Mapping[str, Any]) -> Answer:
    """One document's, over all filters of its answers."""
    first = next(iter(by_filter.values()))
    scores = {
        _label(metric, name): float(sample[metric])
        for name, sample in by_filter.items()
        for metric in sample["metrics"]
        if isinstance(sample[metric], int | float | np.number | np.bool_)
    }
    generated = first["resps"][0][0] if task.OUTPUT_TYPE == "generate_until" else None
    return Answer(
        document=f"{first['doc_id']}:{first['doc_hash'][:12]}",
        scores=scores,
        margin=_margin(task, first),
        text=generated if isinstance(generated, str) else None,
    )


def _margin(task: Any, sample: Mapping[str, Any]) -> float | None:
    """How much likelier the right answer is than the best wrong one; of a task without choices, how likely it is."""
    found = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "loglikelihood":
        return float(found[0][0])
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return float(found[0])
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = task.doc_to_choice(sample["doc"])
    likelihoods = [float(each[0]) for each in found[: len(choices)]]
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    right = {_place(each, choices) for each in (gold if isinstance(gold, list) else [gold])} & set(range(len(choices)))
    wrong = set(range(len(choices))) - right
    if not right or not wrong:
        return None
    return max(likelihoods[place] for place in right) - max(likelihoods[place] for place in wrong)


def _place(gold: Any, choices: Sequence[str]) -> int:
    if isinstance(gold, str):
        return list(choices).index(gold) if gold in choices else -1
    return int(gold)


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds, and the caller's random numbers afterwards."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
