"""What models lose on disturbed prompts and texts, and how much more the compressed one loses than the dense one."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.errors import CompressError
from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.metrics.tasks import fingerprint_of
from llmcompress.evaluation.paired import interval, paired
from llmcompress.evaluation.robustness.disturbances import CharacterNoise, Disturbance, paraphrases
from llmcompress.evaluation.scores import score
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.settings.robustness import RobustnessSettings
from llmcompress.evaluation.settings.tasks import TaskSettings
from llmcompress.evaluation.tasks.answering import answer
from llmcompress.evaluation.tasks.definitions import LoadedTasks, TaskLoader
from llmcompress.evaluation.texts import EvaluationText, evaluation_text
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, Which
from llmcompress.records.tasks import RobustnessComparison, RobustnessResult
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
"""Tokens of an undisturbed window, at most half of the model's: errors make more tokens of the same text."""

WINDOWS = 32

CLEAN = "clean"


@METRICS.register("robustness")
@dataclass(frozen=True)
class RobustnessMetric(Metric):
    """One number per document or window, undisturbed and under every disturbance."""

    settings: RobustnessSettings
    disturbances: tuple[Disturbance, ...]
    tokenizer: PreTrainedTokenizerBase
    higher_is_better: ClassVar[bool]

    @classmethod
    @override
    def prepare(cls, settings: Sequence[RobustnessSettings], subject: Subject) -> list[RobustnessMetric]:
        """Of a task or of a text, each in its own class."""
        loader = TaskLoader() if any(each.task for each in settings) else None
        found: list[RobustnessMetric] = []
        for each in settings:
            noise: list[Disturbance] = [CharacterNoise(rate, each.seed) for rate in each.noise]
            if loader is not None and each.task is not None:
                other = (*noise, *paraphrases(each.prompts))
                asked = TaskSettings(task=each.task, data=each.data, limit=each.limit)
                found.append(_OfTask(each, other, subject.tokenizer, asked, loader.load(asked.task, data=asked.data)))
            else:
                found.append(
                    _OfText(each, tuple(noise), subject.tokenizer, _text(each, subject), subject.max_positions)
                )
        return found

    @property
    @abstractmethod
    def subject(self) -> str:
        """What is disturbed."""

    @property
    @override
    def name(self) -> str:
        return f"robustness on {self.subject}"

    def _result(self, found: Observation, name: str, of: Which) -> RobustnessResult:
        clean, disturbed = found.facts["values"][CLEAN], found.facts["values"][name]
        return RobustnessResult(
            of=of,
            subject=self.subject,
            metric=found.facts["metric"],
            disturbance=name,
            seed=self.settings.seed,
            clean=fmean(clean),
            disturbed=fmean(disturbed),
            loss=interval(self._losses(found, name)),
        )

    def _losses(self, found: Observation, name: str) -> list[float]:
        """How much worse, for every document or window."""
        sign = 1 if self.higher_is_better else -1
        values = found.facts["values"]
        return [sign * (before - after) for before, after in zip(values[CLEAN], values[name], strict=True)]

    @override
    def results(self, found: Observation, of: Which) -> list[Measurement]:
        return [self._result(found, name, of) for name in _names(found)]

    @override
    def compared(self, dense: Observation, found: Observation) -> list[Measurement]:
        comparisons: list[Measurement] = []
        for name in _names(found):
            before, after = self._losses(dense, name), self._losses(found, name)
            comparisons.append(
                RobustnessComparison(
                    subject=self.subject,
                    metric=found.facts["metric"],
                    disturbance=name,
                    seed=self.settings.seed,
                    dense_loss=fmean(before),
                    compressed_loss=fmean(after),
                    extra_loss=paired(before, after),
                )
            )
        return comparisons


@dataclass(frozen=True)
class _OfTask(RobustnessMetric):
    """Prompts of a task; the number is its main metric."""

    asked: TaskSettings
    loaded: LoadedTasks
    higher_is_better: ClassVar[bool] = True

    @property
    @override
    def subject(self) -> str:
        return f"task:{self.asked.name}"

    @property
    @override
    def fingerprint(self) -> str:
        task = fingerprint_of(self.loaded, self.asked, self.tokenizer)
        return hashlib.sha256(repr((task, self.disturbances)).encode()).hexdigest()

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        """A disturbance that changes no prompt (there may be none to change) is told and left out."""
        metric, clean = self._values(runner, progress, None)
        values = {CLEAN: clean}
        for disturbance in self.disturbances:
            edit = _Noticed(disturbance)
            found = self._values(runner, progress, edit)[1]
            if edit.changed:
                values[disturbance.name] = found
            else:
                progress.note(f"{self.name}: {disturbance.name} changes none of its prompts")
        return Observation(facts={"metric": metric, "values": values})

    def _values(self, runner: Runner, progress: Progress, edit: _Noticed | None) -> tuple[str, list[float]]:
        found = answer(runner, self.tokenizer, self.loaded, self.asked, progress=progress, edit=edit)
        metrics = sorted({each.main for each in found.tasks})
        values = [each.values(each.main) for each in found.tasks]
        known = [one for of_task in values if of_task is not None for one in of_task]
        if not known:
            what = f"{self.asked.task} has no metric that is one number per document"
            fix = "choose a task with `acc` or `exact_match`"
            raise CompressError("robustness.metric", what, where="evaluate.robustness", fix=fix)
        return " and ".join(metrics), known


class _Noticed:
    """A disturbance that remembers whether it changed anything."""

    def __init__(self, disturbance: Disturbance) -> None:
        self._disturbance, self.changed = disturbance, False

    def __call__(self, text: str) -> str:
        found = self._disturbance(text)
        self.changed |= found != text
        return found


@dataclass(frozen=True)
class _OfText(RobustnessMetric):
    """Windows of a text, each disturbed by itself; the number is its loss per byte of the undisturbed window."""

    text: EvaluationText
    max_positions: int | None
    higher_is_better: ClassVar[bool] = False

    @property
    @override
    def subject(self) -> str:
        return f"text:{self.text.name}"

    @property
    @override
    def texts(self) -> tuple[EvaluationText, ...]:
        return (self.text,)

    @property
    @override
    def fingerprint(self) -> str:
        windows = [window.tolist() for window in self.text.windows]
        return hashlib.sha256(repr((windows, self.text.bos, self.disturbances)).encode()).hexdigest()

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        written = [self.tokenizer.decode(window[self.text.bos :]) for window in self.text.windows]
        sizes = [max(1, len(text.encode())) for text in written]
        values = {}
        sequences = {CLEAN: list(self.text.windows)}
        for disturbance in self.disturbances:
            sequences[disturbance.name] = [self._window(disturbance(text)) for text in written]
        for name, windows in sequences.items():
            progress.stage(f"{self.name}, {name}", len(windows))
            nats = []
            for scored in score(runner, windows, name=self.text.name):
                nats.append(-float(scored.logprob_P.sum(dtype=torch.float64)))
                progress.step(f"window {scored.window + 1}/{len(windows)}")
            values[name] = [loss / size for loss, size in zip(nats, sizes, strict=True)]
        return Observation(facts={"metric": "nats_per_byte", "values": values})

    def _window(self, text: str) -> Tensor:
        bos = [int(self.text.windows[0][0])] if self.text.bos else []
        tokens = bos + self.tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor(tokens[: self.max_positions])


def _text(settings: RobustnessSettings, subject: Subject) -> EvaluationText:
    window = min(WINDOW, (subject.max_positions or 2 * WINDOW) // 2)
    task = PerplexityTask.model_validate({**PerplexityTask.from_text(settings.text or ""), "window": window})
    task = task.model_copy(update={"max_windows": settings.limit or WINDOWS})
    return evaluation_text(task, subject.tokenizer, subject.max_positions)


def _names(found: Observation) -> list[str]:
    return [name for name in found.facts["values"] if name != CLEAN]
