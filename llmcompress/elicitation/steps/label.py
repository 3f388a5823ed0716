"""`label`: the teacher answers the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools
from llmcompress.elicitation.steps.answering import Answering, batch_of


@STEPS.register("label")
class Label(Answering):
    """A response to every prompt, in place of the one that there may be.

    Source: Kim and Rush, arXiv 1606.07947, section 3.2 (sequence-level distillation); the survey's "labelling".
    """

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        return self.answered("label", [(row, None) for row in batch_of(self, given, number)], tools)
