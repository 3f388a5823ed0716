"""Evaluation texts as token windows, by one protocol for all models.

The text is tokenised once and cut into non-overlapping windows; the last one may be shorter. A window does not see
earlier windows. See docs/decisions/0003-perplexity-protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibration.sources import JOINER, TextSource, paragraph_hashes, read_texts
from llmcompress.calibration.templates import written_out
from llmcompress.calibration.tokens import starts_with_bos, unknown_warning
from llmcompress.errors import CompressError
from llmcompress.evaluation.settings.perplexity import PerplexityTask

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
    """All of `window` tokens, except that the last may be shorter."""
    window: int
    bos: bool
    predicted_bytes: int
    """Bytes of the UTF-8 text whose tokens are predicted."""
    paragraphs: frozenset[int]
    """For the overlap check with the calibration text."""
    text_tokens: int | None = None
    """Of the whole text; None: only a beginning of it was read."""
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens predicted: in every window all but the first."""
        return sum(len(window) - 1 for window in self.windows)


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
    source = TextSource(task.source, task.split, task.config, task.column)
    texts = read_texts(source, max_characters=enough, where=where)
    text = JOINER.join(written_out(texts, tokenizer, where=where)[0])
    tokens, ends = _tokens_and_byte_ends(text, tokenizer)
    unknown = unknown_warning(tokenizer, [text], [tokens])
    length = window - len(bos)
    starts = range(0, len(tokens), length)[:most]
    pieces = [tokens[start : start + length] for start in starts]
    if not bos and pieces and len(pieces[-1]) == 1:
        pieces.pop()  # nothing comes before this token, so it cannot be predicted
    if not pieces:
        what = f"{texts.name}: there is no token to predict"
        raise CompressError("data.too-little", what, where=where, fix="use more text")
    last = starts[len(pieces) - 1] + len(pieces[-1])
    # without a BOS the first token of each window is given, not predicted: its bytes do not count
    given = [] if bos else starts[: len(pieces)]
    predicted_bytes = ends[last] - sum(ends[start + 1] - ends[start] for start in given)
    return EvaluationText(
        texts.name,
        texts.fingerprint,
        tuple(torch.tensor(bos + piece) for piece in pieces),
        window,
        bool(bos),
        predicted_bytes,
        paragraph_hashes([text]),
        None if texts.bounded else len(tokens),
        tuple(warnings + ([unknown] if unknown else [])),
    )


def _window(task: PerplexityTask, limit: int | None) -> tuple[int, list[str]]:
    window = task.window_for(limit)
    if task.window is not None and window < task.window:
        return window, [f"windows shortened from {task.window} to {window} tokens, the model's maximum"]
    return window, []


def _bos(task: PerplexityTask, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at the start of every window."""
    if task.bos == "never" or (task.bos == "auto" and not starts_with_bos(tokenizer)):
        return []
    if tokenizer.bos_token_id is None:
        what = "`bos: always`, but the tokenizer has no BOS token"
        raise CompressError("data.no-bos", what, where="evaluate.perplexity", fix="use `bos: auto`")
    return [tokenizer.bos_token_id]


def _tokens_and_byte_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of `text`, and for k = 0 … tokens the bytes of the text that the first k tokens stand for.

    What stands between two tokens belongs to the later one, and a character of several tokens to its first.
    Tokenizers in Python do not say where tokens stand: each then counts the same share of the text.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    tokens: list[int] = encoded["input_ids"]
    if not tokenizer.is_fast:
        size = len(text.encode())
        return tokens, [round(size * k / max(len(tokens), 1)) for k in range(len(tokens) + 1)]
    ends, characters = [0], 0
    for _, end in encoded["offset_mapping"]:
        end = max(end, characters)
        ends.append(ends[-1] + len(text[characters:end].encode()))
        characters = end
    ends[-1] += len(text[characters:].encode())
    return tokens, ends
