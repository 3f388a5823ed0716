"""`explain`: answers with their explanations, asked for by system messages."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools
from llmcompress.elicitation.steps.answering import Answering, batch_of

ORCA = (
    "You are an AI assistant. Provide a detailed answer so user don't need to search outside to understand the answer.",
    "You are a helpful assistant, who always provide explanation. Think like you are answering to a five year old.",
    "You are an AI assistant. User will you give you a task. Your goal is to complete the task as faithfully as you "
    "can. While performing the task think step-by-step and justify your steps.",
    "You are an AI assistant that helps people find information. User will you give you a question. Your task is to "
    "answer as faithfully as you can. While answering think step-by-step and justify your answer.",
    "Explain how you used the definition to come up with the answer.",
)
"""Some of the paper's sixteen messages, as printed."""


@STEPS.register("explain")
class Explain(Answering):
    """Every prompt is answered under a system message, drawn at random, that asks for an explanation.

    The student learns from the message, the prompt and the explanation.

    Source: Mukherjee et al., arXiv 2306.02707, section 3 and table 2 (Orca).
    """

    messages: tuple[str, ...] = Field(default=ORCA, min_length=1)
    """The system messages."""

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        chance = random.Random(tools.seed)
        asked = [(row, chance.choice(self.messages)) for row in batch_of(self, given, number)]
        return self.answered("explain", asked, tools)
