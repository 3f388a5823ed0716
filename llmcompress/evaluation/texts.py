"""Evaluation texts as token windows, by the default protocol or a published one.

By default the text is tokenised once and cut into non-overlapping windows; the last one may be shorter. A window does
not see earlier windows. See docs/decisions/0003-perplexity-protocol.md and docs/evaluation.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibration.sources import TextSource, paragraph_hashes, read_texts
from llmcompress.calibration.templates import written_out
from llmcompress.calibration.tokens import starts_with_bos, unknown_warning
from llmcompress.errors import CompressError
from llmcompress.evaluation.settings.perplexity import DEFAULT_PROTOCOL, PerplexityTask
from llmcompress.evaluation.windows import Span, spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 8
"""More bytes per token than any tokenizer's average, so that enough of a streamed text is read."""


@dataclass(frozen=True)
class EvaluationText:
    """A text prepared for one model: token windows, and how many bytes they predict."""

    name: str
    fingerprint: str
    windows: tuple[Tensor, ...]
    """The last token of each is only predicted."""
    window: int
    bos: bool
    """Whether every window starts with the BOS token."""
    predicted_bytes: int
    """Bytes of the UTF-8 text whose tokens are predicted, and count."""
    paragraphs: frozenset[int]
    """For the overlap check with the calibration text."""
    text_tokens: int | None = None
    """Of the whole text; None: only a beginning of it was read."""
    warnings: tuple[str, ...] = ()
    skipped: tuple[int, ...] = ()
    """Predictions at the beginning of each window that do not count; empty: all count."""
    protocol: str = DEFAULT_PROTOCOL
    words: int | None = None
    """Separated by white space; None: not all of the text is predicted."""

    @property
    def lengths(self) -> list[int]:
        """Predictions that count, window by window."""
        return [len(window) - 1 - skip for window, skip in zip(self.windows, self.skips, strict=True)]

    @property
    def skips(self) -> tuple[int, ...]:
        """`skipped`, written out."""
        return self.skipped or (0,) * len(self.windows)

    @property
    def tokens(self) -> int:
        """Predictions that count."""
        return sum(self.lengths)


@dataclass(frozen=True)
class _Document:
    """One text as tokens: what is cut into windows."""

    tokens: list[int]
    byte_ends: list[int]
    """For k = 0 … tokens the bytes of the text that the first k tokens stand for."""


@dataclass(frozen=True)
class _Bos:
    """Where the BOS stands, for one tokenizer."""

    each: tuple[int, ...] = ()
    """Before every window."""
    replaces: tuple[int, ...] = ()
    """In place of the first token of every window."""
    first: tuple[int, ...] = ()
    """Before every document."""
    by_tokenizer: bool = False
    """Whether documents are tokenised with what the tokenizer adds."""


def evaluation_texts(
    tasks: Iterable[PerplexityTask], tokenizer: PreTrainedTokenizerBase, max_positions: int | None
) -> tuple[EvaluationText, ...]:
    """The texts of all tasks; different ones of the same name (`wiki/test.txt`, `books/test.txt`) get their hash in it.

    Names are what results are told apart by, and never carry folders.

    Raises: CompressError as `evaluation_text` does.
    """
    texts = [evaluation_text(task, tokenizer, max_positions) for task in tasks]
    contents: dict[str, set[str]] = {}
    for text in texts:
        contents.setdefault(text.name, set()).add(text.fingerprint)
    return tuple(
        replace(text, name=f"{text.name}:{text.fingerprint[:8]}") if len(contents[text.name]) > 1 else text
        for text in texts
    )


def evaluation_text(
    task: PerplexityTask, tokenizer: PreTrainedTokenizerBase, max_positions: int | None
) -> EvaluationText:
    """Read and tokenise the text of `task` for a model of so many positions (None: no limit).

    Needs no weights, so bad text is found before any work.

    Raises: CompressError when the text cannot be read or is too short, or the BOS asked for does not exist.
    """
    window, warnings = _window(task, max_positions)
    bos = _bos(task, tokenizer)
    most = task.most_windows(window)
    enough = None if most is None else most * window * CHARACTERS_PER_TOKEN
    where = f"evaluate.perplexity: {task.source}"
    source = TextSource(task.source, task.split, task.config, task.column, task.revision)
    texts = read_texts(source, max_characters=enough, where=where)
    written = written_out(texts, tokenizer, where=where)[0]
    contents = written if task.joiner is None else [task.joiner.join(written)]
    documents = [_document(content, tokenizer, bos) for content in contents]
    unknown = unknown_warning(tokenizer, contents, [document.tokens for document in documents])
    cut = [
        (document, span)
        for document in documents
        for span in spans(len(document.tokens), task, window, own_bos=bool(bos.each))
    ][:most]
    if not cut:
        what = f"{texts.name}: there is no token to predict"
        raise CompressError("data.too-little", what, where=where, fix="use more text")
    predicted_bytes = sum(document.byte_ends[span.end] - document.byte_ends[span.scored_from] for document, span in cut)
    whole = not texts.bounded and predicted_bytes == sum(document.byte_ends[-1] for document in documents)
    return EvaluationText(
        texts.name,
        texts.fingerprint,
        tuple(_window_tokens(document, span, bos) for document, span in cut),
        window,
        bool(bos.each or bos.replaces),
        predicted_bytes,
        paragraph_hashes(contents),
        None if texts.bounded else sum(len(document.tokens) - len(bos.first) for document in documents),
        tuple(warnings + ([unknown] if unknown else [])),
        tuple(span.skipped for _, span in cut) if any(span.skipped for _, span in cut) else (),
        task.protocol_name,
        sum(len(re.split(r"\s+", content)) for content in contents) if whole else None,
    )


def _window_tokens(document: _Document, span: Span, bos: _Bos) -> Tensor:
    kept = document.tokens[span.start + len(bos.replaces) : span.end]
    return torch.tensor([*bos.each, *bos.replaces, *kept])


def _window(task: PerplexityTask, limit: int | None) -> tuple[int, list[str]]:
    window = task.window_for(limit)
    if isinstance(task.window, int) and window < task.window:
        return window, [f"windows shortened from {task.window} to {window} tokens, the model's maximum"]
    return window, []


def _bos(task: PerplexityTask, tokenizer: PreTrainedTokenizerBase) -> _Bos:
    """Raises: CompressError when a token is asked for that the tokenizer does not have."""
    number = tokenizer.bos_token_id
    if task.bos == "prefix":
        first = tokenizer.eos_token_id if number is None else number
        return _Bos(first=_present(first, "prefix", "neither a BOS nor an EOS token"), by_tokenizer=True)
    if task.bos == "always":
        return _Bos(each=_present(number, "always", "no BOS token"))
    if task.bos == "text":
        return _Bos(by_tokenizer=True)
    if task.bos == "never" or not starts_with_bos(tokenizer):
        return _Bos()
    return _Bos(each=(number,)) if task.bos == "auto" else _Bos(replaces=(number,), first=(number,))


def _present(number: int | None, rule: str, lacks: str) -> tuple[int, ...]:
    if number is None:
        what = f"`bos: {rule}`, but the tokenizer has {lacks}"
        raise CompressError("data.no-bos", what, where="evaluate.perplexity", fix="use `bos: auto`")
    return (number,)


def _document(text: str, tokenizer: PreTrainedTokenizerBase, bos: _Bos) -> _Document:
    """Its tokens. What stands between two tokens belongs to the later one, and a character of several tokens to its
    first; special tokens stand for nothing.

    Tokenizers in Python do not say where tokens stand: each then counts the same share of the text.
    """
    # lm-eval's rule: a text that begins with the BOS gets no second one
    written_bos = bos.by_tokenizer and bool(bos.first) and text.startswith(tokenizer.decode(list(bos.first)))
    encoded = tokenizer(
        text,
        add_special_tokens=bos.by_tokenizer and not written_bos,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    tokens: list[int] = [*bos.first, *encoded["input_ids"]]
    if not tokenizer.is_fast:
        return _Document(tokens, _equal_shares(len(text.encode()), len(tokens)))
    ends, characters = [0] * (len(bos.first) + 1), 0
    for _, end in encoded["offset_mapping"]:
        end = max(end, characters)
        ends.append(ends[-1] + len(text[characters:end].encode()))
        characters = end
    ends[-1] += len(text[characters:].encode())
    return _Document(tokens, ends)


def _equal_shares(size: int, tokens: int) -> list[int]:
    return [round(size * k / max(tokens, 1)) for k in range(tokens + 1)]
