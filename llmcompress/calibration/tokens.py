"""What a tokenizer does by default, found by trying: BOS, unknown tokens, token ids beyond the embedding."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from llmcompress.errors import CompressError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

UNKNOWN_SHARE = 0.01
"""More unknown tokens than this in ordinary text: the tokenizer was made for something else."""
_COMPARED_CHARACTERS = 50_000


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a BOS before every text."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def token_lists(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token numbers of every text, nothing added and nothing cut off."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    lists: list[list[int]] = encoded["input_ids"]
    return lists


def max_positions(config: PretrainedConfig) -> int | None:
    """How many positions the model was made for; None where it has no limit (ALiBi) or does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def unknown_warning(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lists: Sequence[Sequence[int]]
) -> str | None:
    """A warning when too much of the text has no token, as with the tokenizer of another model or language."""
    total = sum(map(len, lists))
    if tokenizer.unk_token_id is None:
        return _lost_warning(tokenizer, texts)
    if not total:
        return None
    unknown = sum(list(tokens).count(tokenizer.unk_token_id) for tokens in lists)
    # a text may hold the unknown token as a word (WikiText does): that is the text's choice, not a misfit
    unknown -= sum(text.count(tokenizer.unk_token) for text in texts)
    if unknown <= UNKNOWN_SHARE * total:
        return None
    return f"{unknown / total:.1%} of the tokens are unknown; does the tokenizer belong to this model?"


def refuse_beyond_embedding(
    windows: Iterable[Tensor], tokenizer: PreTrainedTokenizerBase, rows: int, *, where: str
) -> None:
    """Token ids of a text must have a row in the embedding; ids that no text uses may lie beyond it.

    Raises: CompressError naming the tokens that have none.
    """
    beyond = sorted({number for window in windows for number in window[window >= rows].tolist()})
    if beyond:
        tokens = ", ".join(f"{tokenizer.convert_ids_to_tokens(number)!r} = {number}" for number in beyond[:12])
        raise CompressError(
            "model.vocabulary",
            f"the text contains {len(beyond)} token ids that the embedding of {rows} rows does not have",
            where=f"{where}: {tokens}",
            fix=(
                "use this model's own tokenizer, or add embedding rows for the new tokens: "
                f"model.resize_token_embeddings({beyond[-1] + 1}), then save it with save_pretrained"
            ),
        )


def _lost_warning(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> str | None:
    """Without an unknown token a tokenizer drops what it does not know: what does not come back was lost."""
    sample = "\n".join(islice(texts, 1000))[:_COMPARED_CHARACTERS]
    there = _letters(sample)
    back = tokenizer.decode(token_lists(tokenizer, [sample])[0], clean_up_tokenization_spaces=False) if there else ""
    lost, total = (there - _letters(back)).total(), there.total()
    if lost <= UNKNOWN_SHARE * total:
        return None
    return f"{lost / total:.1%} of the text cannot be tokenized and is lost; does the tokenizer belong to this model?"


def _letters(text: str) -> Counter[str]:
    """How often every character occurs; accents, case and white space are the tokenizer's to normalise."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return Counter(letter for letter in plain if not letter.isspace() and not unicodedata.combining(letter))
