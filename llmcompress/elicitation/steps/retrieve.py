"""`retrieve`: puts passages that fit into the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, PrivateAttr
from typing_extensions import override

from llmcompress.calibration.sources import TextSource, check_source, read_texts
from llmcompress.elicitation.base import STEPS, DataStep, Row, Tools, text_of
from llmcompress.elicitation.bm25 import BM25


@STEPS.register("retrieve")
class Retrieve(DataStep):
    """The best passages of a text, by BM25, stand before every prompt.

    With `query: response` the teacher's rationale decides what is retrieved, as when the paper trains; with
    `query: prompt` it is the question, as when the student is used. The question stays in the column `question`.

    Source: Kang et al., arXiv 2305.18395, section 3.2 (KARD). Differs: no reranker is trained.
    """

    source: str = Field(min_length=1)
    """The text: `builtin:calibration`, a .txt, .jsonl, .parquet, .csv or a Hub dataset."""
    split: str = Field(default="train", min_length=1)
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration of a Hub dataset."""
    characters: int = Field(default=10_000_000, ge=1)
    """How much of a Hub dataset is read."""
    passages: int = Field(default=1, ge=1)
    """Passages before a prompt."""
    words: int = Field(default=100, ge=1)
    """Words of a passage; texts are cut into them."""
    query: Literal["prompt", "response"] = "prompt"
    """The column that the passages must fit."""
    template: str = "{passages}\n\n{prompt}"
    """The new prompt."""

    _index: list[tuple[list[str], BM25]] = PrivateAttr(default_factory=list)

    @override
    def check(self) -> None:
        check_source(self.source, where="data.retrieve.source")

    @override
    def units(self, given: Sequence[Row]) -> int:
        return len(given)

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        row = given[number]
        if not self._index:
            passages = self._passages()
            self._index.append((passages, BM25(passages)))
        passages, index = self._index[0]
        question = text_of(row, "prompt", step="retrieve")
        best = index.best(text_of(row, self.query, step="retrieve"), self.passages)
        found = "\n\n".join(passages[place] for place in best)
        prompt = self.template.replace("{passages}", found).replace("{prompt}", question)
        return [{**row, "question": question, "prompt": prompt}]

    def _passages(self) -> list[str]:
        source = TextSource(self.source, self.split, self.config)
        texts = read_texts(source, format="text", max_characters=self.characters, where="data.retrieve.source")
        found = []
        for document in texts.documents:
            words = document.split()
            found += [" ".join(words[first : first + self.words]) for first in range(0, len(words), self.words)]
        return found
