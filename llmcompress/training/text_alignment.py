"""Two tokenizers on one text: where both have read the same part of it, and which of their tokens are spelled alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmcompress.calibration.tokens import starts_with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "a"
"""A word before a token: some tokenizers drop the space at the beginning of a text."""
_BROKEN = "\ufffd"
"""What a part of a character is decoded to."""


@dataclass(frozen=True)
class Aligned:
    """The tokens of the other tokenizer for the same text."""

    ids: list[int]
    places: list[int | None]
    """For every token of the first: the place of the other's token that ends at the same character."""


@dataclass(frozen=True)
class Pair:
    """Tokenizers of student and teacher."""

    mine: PreTrainedTokenizerBase
    theirs: PreTrainedTokenizerBase

    def aligned(self, ids: Sequence[int]) -> Aligned:
        """The text of `ids` in the other's tokens.

        Tokens that are not text (BOS, EOS) are translated where the other has such a token, and left out elsewhere; the
        text between two of them is tokenised by itself. A BOS that the other puts before every text is added.
        """
        special = self._special
        begins = starts_with_bos(self.theirs) and special.get(next(iter(ids), -1)) != self.theirs.bos_token_id
        found = [self.theirs.bos_token_id] * begins
        places, text = list[int | None](), list[int]()
        for token in (*ids, None):
            if token is not None and token not in special:
                text.append(token)
                continue
            if text:
                others, ends = self._text(text)
                places += [None if end is None else len(found) + end for end in ends]
                found += others
                text = []
            if token is not None:
                other = special[token]
                found += [] if other is None else [other]
                places.append(len(found) - 1 if found else None)
        return Aligned(found, places)

    def matched(self) -> tuple[list[int], list[int]]:
        """Tokens that are spelled alike, of the first and of the other; one at least of each remains without match."""
        here, there = _spelled(self.mine), _spelled(self.theirs)
        pairs = {here[text]: there[text] for text in here.keys() & there.keys()}
        pairs |= {mine: theirs for mine, theirs in self._special.items() if theirs is not None}
        both = sorted(pairs.items())
        if len(both) >= min(len(self.mine), len(self.theirs)):
            both = both[:-1]
        return [mine for mine, _ in both], [theirs for _, theirs in both]

    @cached_property
    def _special(self) -> dict[int, int | None]:
        """The first's tokens that are not text, and the other's of the same name or for the same purpose."""
        known: dict[int, int | None] = {
            token: self.theirs.get_vocab().get(self.mine.convert_ids_to_tokens(token))
            for token in self.mine.all_special_ids
        }
        names = ("unk_token_id", "pad_token_id", "bos_token_id", "eos_token_id")  # one token may serve several purposes
        for name in names:
            mine, theirs = getattr(self.mine, name), getattr(self.theirs, name)
            if mine is not None and theirs is not None:
                known[mine] = theirs
        return known

    def _text(self, ids: list[int]) -> tuple[list[int], list[int | None]]:
        text = _decoded(self.mine, ids)
        others: list[int] = self.theirs(text, add_special_tokens=False)["input_ids"]
        ends = {end: place for place, end in enumerate(_ends(self.theirs, others, text)) if end is not None}
        return others, [None if end is None else ends.get(end) for end in _ends(self.mine, ids, text)]


def _ends(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[int | None]:
    """How many characters of `text` have been read after each token; None inside a character."""
    begun = [_decoded(tokenizer, ids[: count + 1]) for count in range(len(ids))]
    found: list[int | None] = [len(part) if text.startswith(part) else None for part in begun]
    if found:
        found[-1] = len(text)
    return found


def _spelled(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text → token; a part of a character has its name in the vocabulary instead of a text."""
    anchor: list[int] = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
    before = len(_decoded(tokenizer, anchor))
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [token for token in range(len(tokenizer)) if token not in special]
    texts = tokenizer.batch_decode([[*anchor, token] for token in ids], clean_up_tokenization_spaces=False)
    found: dict[str, int] = {}
    for token, text in zip(ids, texts, strict=True):
        if _BROKEN in text:
            found.setdefault(_BROKEN + str(tokenizer.convert_ids_to_tokens(token)), token)
        elif len(text) > before:
            found.setdefault(text[before:], token)
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text
