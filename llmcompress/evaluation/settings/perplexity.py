"""`perplexity:` a text on which models are evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import override

from llmcompress.calibration.sources import JOINER, bytes_of_text
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, EvaluatedTokens, LocalSource, MetricSettings
from llmcompress.evaluation.settings.protocol import protocol_options

_WITH_SPLIT = re.compile(r"(?!builtin:)(?P<source>.+):(?P<split>[A-Za-z][\w-]*(\[[^]]*\])?)")

LONGEST_DEFAULT_WINDOW = 2048

DEFAULT_TOKENS = 16_384
"""Measured of a text where nothing else is asked for, dense and compressed alike: docs/decisions/0029."""

BYTES_PER_TOKEN = 4.0
"""Of ordinary text: a guess, for estimates of time alone."""


DEFAULT_PROTOCOL = "default"

_READING = ("joiner", "window", "stride", "next_token", "scored", "bos", "last")
"""Options that decide which tokens are predicted from what: together a protocol."""
_STATED = ("window", "bos")
"""Of those, the ones that every result states beside its protocol."""


@METRIC_SETTINGS.register("perplexity")
class PerplexityTask(MetricSettings):
    """A text on which the dense and the compressed model are evaluated."""

    # the schema says nothing of what a protocol fills in
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))

    protocol: str | None = None
    """A published protocol: `gptq`, `gptq-c4`, `gptq-ptb`, `llm-pruner`, `wanda`, `llama-cpp`, `lm-eval-rolling`. It
    gives the options below their values, except those that are written beside it."""
    source: str = Field(min_length=1)
    """`builtin:evaluation`, a local .txt/.jsonl/.parquet/.csv, or a Hub dataset id (`wikitext2`, `c4`, `ptb`); the
    protocol's where it is left out."""
    split: str = Field(default="test", min_length=1)
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration of a Hub dataset (`wikitext-2-raw-v1`)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    column: str | None = None
    """The column with the text; None: found by its usual names."""
    joiner: str | None = JOINER
    """Stands between documents, which are then one text; None: every document is measured by itself."""
    window: Annotated[int, Field(ge=2)] | Literal["limit"] | None = None
    """Tokens per window, BOS included; None: the model's limit, at most 2048; `limit`: the model's limit."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens from the start of a window to the next one's; None: windows do not overlap."""
    next_token: bool = False
    """Also predict the token behind each window, which then begins the next window (as lm-eval does)."""
    scored: Literal["all", "new", "second_half"] = "all"
    """Predicted tokens that count: `new`, those that no earlier window predicted; `second_half`, those predicted from
    more than half a window."""
    bos: Literal["auto", "always", "never", "text", "replace", "prefix"] = "auto"
    """Where the BOS token stands. At the start of every window: `auto`, as the tokenizer does with a text, `always`,
    `never`. `text`: where the tokenizer puts it in the whole text. `replace`: in place of the first token of every
    window if the tokenizer adds one. `prefix`: before every document, or else the EOS."""
    last: Literal["kept", "dropped", "whole"] = "kept"
    """What is left for the last window: `kept` as a shorter one, `dropped`, or made `whole` by starting earlier."""
    max_windows: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """Evaluate only the first windows; None: as many as 16,384 tokens fill; `all`: the whole text."""
    top: int = Field(default=64, ge=1)
    """Most likely tokens whose probabilities are kept at each position for KL, with 8 bytes each; the rest counts as
    one event."""

    @model_validator(mode="before")
    @classmethod
    def _of_protocol(cls, written: Any) -> Any:
        name = written.get("protocol") if isinstance(written, dict) else None
        return {**protocol_options(name), **written} if isinstance(name, str) else written

    @model_validator(mode="after")
    def _counts_once(self) -> Self:
        if self.stride is not None and self.scored == "all":
            raise _refused("`stride` with `scored: all` counts tokens twice", "write `scored: new`")
        if self.stride is not None and isinstance(self.window, int) and self.stride > self.window:
            raise _refused("a `stride` longer than `window` leaves tokens out", f"write at most {self.window}")
        if self.bos in ("auto", "always") and self.next_token:
            raise _refused("`next_token` needs windows without a BOS of their own", "write `bos: prefix`")
        return self

    @property
    def protocol_name(self) -> str:
        """What results are labelled with: the protocol, and what of it was changed."""
        base = protocol_options(self.protocol) if self.protocol else {}
        usual = {name: base.get(name, type(self).model_fields[name].default) for name in _READING}
        stated = () if self.protocol else _STATED
        changed = [
            f"{name} {json.dumps(getattr(self, name))}"
            for name in _READING
            if getattr(self, name) != usual[name] and name not in stated
        ]
        return " with ".join([self.protocol or DEFAULT_PROTOCOL, *([", ".join(changed)] if changed else [])])

    def window_for(self, max_positions: int | None) -> int:
        """Tokens in a window of a model of so many positions (None: no limit)."""
        if self.window == "limit":
            return max_positions or LONGEST_DEFAULT_WINDOW
        wanted = LONGEST_DEFAULT_WINDOW if self.window is None else self.window
        return min(max_positions or wanted, wanted)

    def most_windows(self, window: int) -> int | None:
        """How many windows of that length are measured, where the text has so many; None: all."""
        if self.max_windows == "all":
            return None
        return max(1, DEFAULT_TOKENS // window) if self.max_windows is None else self.max_windows

    @override
    def sources(self) -> Iterator[LocalSource]:
        yield LocalSource(self.source, f"evaluate.perplexity: {self.source}")

    @override
    def evaluated_tokens(self, max_positions: int | None) -> Iterator[EvaluatedTokens]:
        window = self.window_for(max_positions)
        size, most = bytes_of_text(self.source), self.most_windows(window)
        known = [size / BYTES_PER_TOKEN] if size is not None else []
        bounded = [float(most * window)] if most is not None else []
        overlap = window / min(self.stride or window, window)
        yield EvaluatedTokens(window, min([*(each * overlap for each in known), *bounded], default=None))

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """Source, or source:split: `builtin:evaluation`, `file.txt`, `wikitext2`, `wikitext2:validation`."""
        found = _WITH_SPLIT.fullmatch(text)
        return {"source": found["source"], "split": found["split"]} if found else {"source": text}


BUNDLED_TEXT = (PerplexityTask(source="builtin:evaluation"),)
"""The default evaluation."""


def _refused(what: str, fix: str) -> CompressError:
    return CompressError("evaluate.protocol", what, where="evaluate.perplexity", fix=fix, exit_code=ExitCode.USAGE)
