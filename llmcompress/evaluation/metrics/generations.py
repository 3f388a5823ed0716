"""Greedy continuations of prompts: what can be verified of them, and how they differ from the dense model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from llmcompress.evaluation.generations.prompts import WHERE, Prompt, read_prompts, tokens_of
from llmcompress.evaluation.generations.statistics import distinct, repetition, require_rouge, rouge_l
from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.metrics.tasks import refuse_chat_without_template
from llmcompress.evaluation.paired import interval, paired
from llmcompress.evaluation.settings.generations import GenerationSettings
from llmcompress.evaluation.tasks.generating import AT_ONCE
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, Which
from llmcompress.records.tasks import GeneratedText, GenerationComparison, GenerationPair, GenerationsResult
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@METRICS.register("generations")
@dataclass(frozen=True)
class GenerationMetric(Metric):
    """Prompts as tokens; observed are the texts that follow."""

    settings: GenerationSettings
    prompts: tuple[Prompt, ...]
    tokens: tuple[tuple[int, ...], ...]
    chat: bool
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    @override
    def prepare(cls, settings: Sequence[GenerationSettings], subject: Subject) -> list[GenerationMetric]:
        require_rouge()
        return [cls._of(each, subject) for each in settings]

    @classmethod
    def _of(cls, settings: GenerationSettings, subject: Subject) -> GenerationMetric:
        tokenizer, wanted = subject.tokenizer, settings.chat_template
        chat = bool(tokenizer.chat_template) if wanted == "auto" else wanted
        refuse_chat_without_template(tokenizer, chat, where=WHERE)
        prompts = read_prompts(settings.prompts, settings.limit)
        room = max(1, (subject.max_positions or 2**31) - settings.max_new_tokens)
        tokens = tuple(tuple(tokens_of(prompt, tokenizer, chat=chat)[-room:]) for prompt in prompts)
        return cls(settings, tuple(prompts), tokens, chat, tokenizer)

    @property
    @override
    def name(self) -> str:
        return f"generations from {_file_name(self.settings.prompts)}"

    @property
    @override
    def fingerprint(self) -> str:
        facts = [self.tokens, self.settings.max_new_tokens, self.tokenizer.eos_token_id]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        stop = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        most = self.settings.max_new_tokens
        starts = range(0, len(self.tokens), AT_ONCE)
        progress.stage(self.name, len(starts))
        written: list[dict[str, Any]] = []
        for start in starts:
            batch = self.tokens[start : start + AT_ONCE]
            for new in runner.generate(batch, max_new_tokens=most, stop=stop):
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                written.append({"text": text, "tokens": len(new), "ended": len(new) < most})
            progress.step(f"{start + len(batch)}/{len(self.tokens)} prompts")
        return Observation(facts={"texts": written})

    @override
    def results(self, found: Observation, of: Which) -> list[Measurement]:
        texts = self._texts(found)
        followed = [float(held) for text in texts for held in text.checks.values()]
        words = [each.text for each in texts]
        result = GenerationsResult(
            of=of,
            source=_file_name(self.settings.prompts),
            chat_template=self.chat,
            max_new_tokens=self.settings.max_new_tokens,
            texts=texts,
            tokens=interval([each.tokens for each in texts]),
            repetition=interval([repetition(text) for text in words]),
            distinct_1=distinct(words, 1),
            distinct_2=distinct(words, 2),
            followed=interval(followed) if followed else None,
        )
        return [result]

    @override
    def compared(self, dense: Observation, found: Observation) -> list[Measurement]:
        before, after = self._texts(dense), self._texts(found)
        scores = rouge_l([each.text for each in before], [each.text for each in after])
        followed = [[float(held) for text in side for held in text.checks.values()] for side in (before, after)]
        comparison = GenerationComparison(
            source=_file_name(self.settings.prompts),
            rouge_l=interval(scores),
            same=interval([float(one.text == other.text) for one, other in zip(before, after, strict=True)]),
            repetition_change=paired(*([repetition(each.text) for each in side] for side in (before, after))),
            tokens_change=paired(*([float(each.tokens) for each in side] for side in (before, after))),
            followed_change=paired(*followed) if followed[0] else None,
            pairs=tuple(
                GenerationPair(prompt=one.prompt, dense=one.text, compressed=other.text, rouge_l=score)
                for one, other, score in zip(before, after, scores, strict=True)
            ),
        )
        return [comparison]

    def _texts(self, found: Observation) -> tuple[GeneratedText, ...]:
        return tuple(
            GeneratedText(
                prompt=prompt.text,
                checks={check.kind: check.follows(written["text"]) for check in prompt.checks},
                **written,
            )
            for prompt, written in zip(self.prompts, found.facts["texts"], strict=True)
        )


def _file_name(source: str) -> str:
    """Reports name files, never folders."""
    return source.replace("\\", "/").rpartition("/")[2]
