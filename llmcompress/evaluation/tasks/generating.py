"""Greedy texts that end at a string, from runners that can only end at a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcompress.progress import Progress
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_PIECE = 32
"""Tokens generated before a text is first searched for its end; every later piece is twice as long."""

AT_ONCE = 16
"""Prompts that are continued together."""


def generate_until_strings(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    progress: Progress,
) -> list[str]:
    """The continuation of every prompt, at least as far as the first of its stop strings, which the caller cuts off.

    Texts grow in pieces that double: a prompt is read about log2(max_new_tokens / 32) times, and no text grows much
    beyond twice its length. Greedy generation of tokens in pieces is generation at once.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]
    progress.stage("generated answers", len(batches))
    found = [""] * len(prompts)
    for number, batch in enumerate(batches, start=1):
        texts = _continued(runner, tokenizer, [prompts[index] for index in batch], until, max_new_tokens)
        for index, text in zip(batch, texts, strict=True):
            found[index] = text
        progress.step(f"batch {number}/{len(batches)}")
    return found


def _continued(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    new: list[list[int]] = [[] for _ in prompts]
    growing, length, piece = list(range(len(prompts))), 0, FIRST_PIECE
    while growing and length < max_new_tokens:
        step = min(piece, max_new_tokens - length)
        pieces = runner.generate([[*prompts[index], *new[index]] for index in growing], max_new_tokens=step, stop=stop)
        for index, tokens in zip(growing, pieces, strict=True):
            new[index] += tokens
        length, piece = length + step, 2 * piece
        growing = [index for index in growing if len(new[index]) == length and not _ended(tokenizer, new[index], until)]
    return [_text(tokenizer, tokens) for tokens in new]


def _ended(tokenizer: PreTrainedTokenizerBase, tokens: list[int], until: Sequence[str]) -> bool:
    text = _text(tokenizer, tokens)
    return any(term in text for term in until if term)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text
