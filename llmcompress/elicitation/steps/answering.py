"""What all steps share in which a model writes: who writes, how texts are drawn, and answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.authors import Drawing
from llmcompress.elicitation.base import DataStep, Row, Tools, part_of, text_of, units_of


class Writing(DataStep):
    """A step in which a model writes."""

    by: str = Field(default="original", min_length=1)
    """Who writes: `original` (the model that the recipe compresses, before that), a Hub id or a folder."""
    tokens: int = Field(default=256, ge=1)
    """The most that is written for one row."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the drawing; 0: always the likeliest token."""
    batch: int = Field(default=8, ge=1)
    """Rows that are written together, and saved together."""

    @override
    def asks(self) -> tuple[str, ...]:
        return (self.by,)

    def drawing(self, tools: Tools) -> Drawing:
        """For one unit."""
        return Drawing(self.tokens, self.temperature, tools.seed)


class Answering(Writing):
    """A step that writes one response to every prompt."""

    form: Literal["prompt", "chat"] = "prompt"
    """prompt: the model continues the prompt as it stands; chat: it is asked in its chat template, and rows get
    `messages`."""

    @override
    def units(self, given: Sequence[Row]) -> int:
        return units_of(len(given), self.batch)

    def answered(self, name: str, asked: Sequence[tuple[Row, str | None]], tools: Tools) -> list[Row]:
        """Rows with a response; each was asked with a system message or without. Empty responses are dropped."""
        author = tools.author(self.by)
        prompts = [text_of(row, "prompt", step=name) for row, _ in asked]
        if self.form == "chat":
            texts = [author.chat(system, prompt) for prompt, (_, system) in zip(prompts, asked, strict=True)]
        else:
            systems = [system for _, system in asked]
            prompts = [f"{first}\n\n{text}" if first else text for first, text in zip(systems, prompts, strict=True)]
            texts = prompts
        found = []
        responses = author.continued(texts, self.drawing(tools))
        for (row, system), prompt, response in zip(asked, prompts, responses, strict=True):
            if not response.strip():
                continue
            if self.form == "chat":
                before = [{"role": "system", "content": system}] if system else []
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response.strip()}]
                found.append({**row, "response": response, "messages": [*before, *turns]})
            else:
                found.append({**row, "prompt": prompt, "response": response})
        return found


def batch_of(step: Writing, given: Sequence[Row], number: int) -> Sequence[Row]:
    """The rows of a unit."""
    return part_of(given, number, step.batch)
