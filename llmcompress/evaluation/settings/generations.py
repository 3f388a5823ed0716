"""`generations:` texts that the dense and the compressed model write from the same prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from typing_extensions import override

from llmcompress.evaluation.settings.base import METRIC_SETTINGS, EvaluatedTokens, LocalSource, MetricSettings

BUNDLED_PROMPTS = "builtin:prompts"
PROMPT_TOKENS = 64
"""A guess, for estimates of time alone."""


@METRIC_SETTINGS.register("generations")
class GenerationSettings(MetricSettings):
    """Prompts that are continued greedily."""

    prompts: str = Field(default=BUNDLED_PROMPTS, min_length=1)
    """`builtin:prompts`, or a file of rows with `prompt`, `instruction`, `turns` or `messages`; IFEval's rows too."""
    limit: int | None = Field(default=16, ge=1)
    """Only the first prompts; None: all."""
    max_new_tokens: int = Field(default=64, ge=1)
    """The longest text."""
    chat_template: Literal["auto"] | bool = "auto"
    """Whether prompts are written with the tokenizer's chat template; `auto`: if it has one."""

    @override
    def sources(self) -> Iterator[LocalSource]:
        if self.prompts != BUNDLED_PROMPTS:
            yield LocalSource(self.prompts, "evaluate.generations")

    @override
    def evaluated_tokens(self, max_positions: int | None) -> Iterator[EvaluatedTokens]:
        """Writing a token reads all weights, whatever the batch: the estimate is low."""
        length = PROMPT_TOKENS + self.max_new_tokens
        yield EvaluatedTokens(length, None if self.limit is None else float(self.limit * length))

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """The prompts alone."""
        return {"prompts": text}
