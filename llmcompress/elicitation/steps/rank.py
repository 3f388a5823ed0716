"""`rank`: several answers to every prompt, of which a teacher likes one best and one least."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools, text_of
from llmcompress.elicitation.steps.answering import Writing


@STEPS.register("rank")
class Rank(Writing):
    """The model writes answers, the teacher ranks them by their mean log-likelihood; the best and the worst are kept.

    Rows get `chosen` and `rejected`, from which the pass `preference` learns. A response that a row already has is one
    of the answers. Prompts with two equal answers at both ends are dropped.

    Source: Tunstall et al., arXiv 2310.16944, section 3.2 (Zephyr: ranked answers). Differs: the likelihood under the
    teacher instead of a judge's marks; the worst answer instead of a random other one.
    """

    teacher: str = Field(default="original", min_length=1)
    """Who ranks: `original`, a Hub id or a folder."""
    answers: int = Field(default=4, ge=1)
    """Answers that are written to every prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the drawing; 1: the model's own distribution."""

    @override
    def asks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.by, self.teacher)))

    @override
    def units(self, given: Sequence[Row]) -> int:
        return len(given)

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        row = given[number]
        prompt = text_of(row, "prompt", step="rank")
        written = tools.author(self.by).continued([prompt] * self.answers, self.drawing(tools))
        answers = [
            text
            for text in dict.fromkeys([*written, *([row["response"]] if "response" in row else [])])
            if text.strip()
        ]
        if len(answers) < 2:
            return []
        losses = tools.author(self.teacher).losses([prompt] * len(answers), answers)
        best, worst = (answers[losses.index(end)] for end in (min(losses), max(losses)))
        return [{"prompt": prompt, "chosen": best, "rejected": worst}] if best != worst else []
