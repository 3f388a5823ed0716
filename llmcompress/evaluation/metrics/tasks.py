"""Tasks through lm-eval: one task or group is one metric, after which an evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.settings.tasks import TaskSettings
from llmcompress.evaluation.tasks.answering import answer
from llmcompress.evaluation.tasks.comparing import task_comparisons, task_results
from llmcompress.evaluation.tasks.definitions import WHERE, LoadedTasks, TaskLoader
from llmcompress.evaluation.tasks.observation import TaskObservation
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, Which
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENISED_DOCUMENTS = 16
"""Of each task: enough to tell tokenizers apart."""

_PLACES = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs")
"""Of a task's config: where data lie. What they are is in the hashes of the documents."""


@METRICS.register("tasks")
@dataclass(frozen=True)
class TaskMetric(Metric):
    """A task or group, with its documents read; observed are the answers to all of them."""

    settings: TaskSettings
    loaded: LoadedTasks
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """Of what is asked and how: see `fingerprint_of`."""

    @classmethod
    @override
    def prepare(cls, settings: Sequence[TaskSettings], subject: Subject) -> list[TaskMetric]:
        loader, tokenizer = TaskLoader(), subject.tokenizer
        found = []
        for each in settings:
            refuse_chat_without_template(tokenizer, each.chat_template, where=f"{WHERE}: {each.task}")
            loaded = loader.load(each.task, data=each.data)
            found.append(cls(each, loaded, tokenizer, fingerprint_of(loaded, each, tokenizer)))
        return found

    @property
    @override
    def name(self) -> str:
        return self.settings.name

    @property
    @override
    def fingerprint(self) -> str:
        return self.digest

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        found = answer(runner, self.tokenizer, self.loaded, self.settings, progress=progress)
        return Observation(facts=found.model_dump(mode="json"))

    @override
    def results(self, found: Observation, of: Which) -> list[Measurement]:
        return [*task_results(TaskObservation.model_validate(found.facts), of)]

    @override
    def compared(self, dense: Observation, found: Observation) -> list[Measurement]:
        before, after = (TaskObservation.model_validate(each.facts) for each in (dense, found))
        return [*task_comparisons(before, after)]


def refuse_chat_without_template(tokenizer: PreTrainedTokenizerBase, wanted: bool, *, where: str) -> None:
    """Raises: CompressError when a chat template is asked for and the tokenizer has none."""
    if wanted and not tokenizer.chat_template:
        what = "the model's tokenizer has no chat template"
        raise CompressError("data.no-chat-template", what, where=where, fix="set `chat_template: false`")


def fingerprint_of(loaded: LoadedTasks, settings: TaskSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the documents that are asked, how they are asked, and how they are tokenised."""
    found = hashlib.sha256()
    template = tokenizer.chat_template if settings.chat_template else None
    facts = [settings.limit, settings.shots, template, metadata.version("lm-eval")]
    found.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, task in sorted(loaded.tasks.items()):
        config = {key: value for key, value in task.dump_config().items() if key not in _PLACES}
        found.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        for number, document in enumerate(_documents(task, settings.limit)):
            text = json.dumps(document, sort_keys=True, default=str)
            found.update(text.encode())
            if number < TOKENISED_DOCUMENTS:
                found.update(repr(tokenizer.encode(text)).encode())
    return found.hexdigest()


def _documents(task: Any, limit: int | None) -> Iterator[Mapping[str, Any]]:
    return islice(iter(task.eval_docs), limit)
