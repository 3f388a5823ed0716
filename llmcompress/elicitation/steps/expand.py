"""`expand`: new instructions, written after the example of others."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools, text_of
from llmcompress.elicitation.steps.answering import Writing
from llmcompress.evaluation.generations.statistics import require_rouge, rouge_l

_NEXT = re.compile(r"\n\s*(?:Task|\d+[.:)]|\n)")


@STEPS.register("expand")
class Expand(Writing):
    """Instructions that a model adds to those it was shown; a new one is kept if it resembles none of the others.

    Each request shows some of the given instructions and some of the new ones. Answers come from a later `label`.

    Source: Wang et al., arXiv 2212.10560, section 2.2 (Self-Instruct: six of the seeds and two of the model's own,
    ROUGE-L below 0.7). Differs: one instruction per request; no distinction of classification tasks.
    """

    count: int = Field(default=64, ge=1)
    """New instructions that are wanted."""
    attempts: int = Field(default=4, ge=1)
    """Requests per instruction that is wanted, at most."""
    seeds: int = Field(default=6, ge=1)
    """Given instructions in a request."""
    own: int = Field(default=2, ge=0)
    """New instructions in a request, as far as there are any."""
    similarity: float = Field(default=0.7, gt=0, le=1)
    """ROUGE-L with the most similar other instruction from which on a new one is dropped."""
    shortest: int = Field(default=3, ge=1)
    """Fewest words of an instruction."""
    longest: int = Field(default=150, ge=1)
    """Most words of an instruction."""
    heading: str = "Come up with a series of tasks:"
    """What a request begins with."""
    tokens: int = Field(default=64, ge=1)
    """The most that is written for one instruction."""

    @override
    def check(self) -> None:
        require_rouge()

    @override
    def units(self, given: Sequence[Row]) -> int:
        return 1 + self.count * self.attempts

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        if not number:
            return list(given)
        new = made[len(given) :]
        if len(new) >= self.count:
            return []
        chance = random.Random(tools.seed)
        shown = [*_some(given, self.seeds, chance), *_some(new, self.own, chance)]
        chance.shuffle(shown)
        request = _request(self.heading, [text_of(row, "prompt", step="expand") for row in shown])
        (text,) = tools.author(self.by).continued([request], self.drawing(tools))
        instruction = _NEXT.split(text.strip(), maxsplit=1)[0].strip()
        fits = self.shortest <= len(instruction.split()) <= self.longest
        return [{"prompt": instruction}] if fits and self._is_new(instruction, made) else []

    def _is_new(self, instruction: str, made: Sequence[Row]) -> bool:
        others = [text_of(row, "prompt", step="expand") for row in made]
        return max(rouge_l(others, [instruction] * len(others)), default=0.0) < self.similarity


def _some(rows: Sequence[Row], count: int, chance: random.Random) -> list[Row]:
    return chance.sample(list(rows), min(count, len(rows)))


def _request(heading: str, instructions: Sequence[str]) -> str:
    tasks = [f"Task {number}: {' '.join(text.split())}" for number, text in enumerate(instructions, start=1)]
    return "\n".join([heading, "", *tasks, f"Task {len(tasks) + 1}:"])
