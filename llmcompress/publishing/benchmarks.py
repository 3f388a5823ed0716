"""Scores of benchmarks as `.eval_results/*.yaml`: the Hub shows them on the model page and on the leaderboard.

Source: https://huggingface.co/docs/hub/eval-results. A benchmark is a dataset whose `eval.yaml` names its tasks, each a
configuration and a split; the name of a task is read from there, because it changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmcompress.publishing.hub import asked
from llmcompress.publishing.outgoing import OutgoingFile
from llmcompress.records.tasks import TaskDataset, TaskResult

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FOLDER = ".eval_results"
_DEFINITION = "eval.yaml"
_RIGHT = ("acc", "acc_norm", "exact_match")
"""Metrics of which leaderboards show the percentage."""


@dataclass(frozen=True)
class Score:
    """What was measured on all documents of a split."""

    name: str
    """Of the task, or of the tasks that share the split."""
    dataset: TaskDataset
    value: float
    """Between 0 and 1."""
    notes: str


def benchmark_files(results: Iterable[TaskResult], *, repository: str, api: HfApi) -> list[OutgoingFile]:
    """A file for every task whose dataset is a benchmark of the Hub and of which every document was answered.

    Raises: errors of huggingface_hub where the Hub cannot be asked. A dataset that this login may not read is none.
    """
    source = {"url": f"https://huggingface.co/{repository}", "name": "Model card"}
    found = []
    for score in whole_splits(results):
        task = _task_of(score.dataset, _definition(api, score.dataset.path))
        if task is not None:
            entry = {
                "dataset": {"id": score.dataset.path, "task_id": task},
                "value": round(100 * score.value, 2),
                "source": source,
                "notes": score.notes,
            }
            text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
            found.append(OutgoingFile(f"{FOLDER}/{score.name}.yaml", text.encode()))
    return found


def whole_splits(results: Iterable[TaskResult]) -> Iterator[Score]:
    """Tasks that use a whole split; tasks that share one between them, such as the subjects of MMLU-Pro, are one score.

    A part of a benchmark is no score of it.
    """
    parts: defaultdict[tuple[TaskDataset, str, int, bool, str], list[TaskResult]] = defaultdict(list)
    for each in results:
        if each.of == "dense" or each.dataset is None or each.main.partition(",")[0] not in _RIGHT:
            continue
        if each.documents == each.dataset.rows:
            yield Score(each.task, each.dataset, each.main_score.value, _notes(each))
        elif each.limit is None and each.documents < each.dataset.rows:
            parts[each.dataset, each.main, each.shots, each.chat_template, each.version].append(each)
    for (dataset, *_), members in parts.items():
        different = len({each.task for each in members}) == len(members)
        if different and sum(each.documents for each in members) == dataset.rows:
            right = sum(each.main_score.value * each.documents for each in members)
            yield Score(_shared_name(members), dataset, right / dataset.rows, _notes(members[0]))


def _shared_name(members: Sequence[TaskResult]) -> str:
    """`mmlu_pro` of `mmlu_pro_biology` and `mmlu_pro_law`."""
    words = [each.task.split("_") for each in members]
    shared = [first for first, *others in zip(*words, strict=False) if all(first == other for other in others)]
    return "_".join(shared) or members[0].dataset.path.partition("/")[2]  # type: ignore[union-attr]


def _notes(result: TaskResult) -> str:
    chat = "chat template" if result.chat_template else "no chat template"
    return f"{result.main}, {result.shots} shots, {chat}, lm-eval {result.task} version {result.version}"


def _definition(api: HfApi, dataset: str) -> Mapping[str, Any]:
    """The `eval.yaml` of a dataset; empty where it is no benchmark, or this login may not read it."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        file = asked(lambda: api.hf_hub_download(dataset, _DEFINITION, repo_type="dataset"))
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (EntryNotFoundError, RepositoryNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _task_of(dataset: TaskDataset, definition: Mapping[str, Any]) -> str | None:
    """The benchmark's name for a configuration and a split; None where it is not one of its tasks."""
    tasks = definition.get("tasks")
    for each in tasks if isinstance(tasks, list) else ():
        if isinstance(each, dict) and each.get("id"):
            place = str(each.get("config") or "default"), str(each.get("split") or "test")
            if place == (dataset.config, dataset.split):
                return str(each["id"])
    return None
