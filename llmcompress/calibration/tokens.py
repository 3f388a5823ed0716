"""What a tokenizer does of its own accord, found by trying: BOS, chat template, unknown tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.calibration.records import Format
from llmcompress.calibration.sources import Texts
from llmcompress.errors import CompressError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

UNKNOWN_SHARE = 0.01
"""More unknown tokens than this in ordinary text: the tokenizer was made for something else."""


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
    if tokenizer.unk_token_id is None or not total:
        return None
    unknown = sum(list(tokens).count(tokenizer.unk_token_id) for tokens in lists)
    # a text may hold the unknown token as a word (WikiText does): that is the text's choice, not a misfit
    unknown -= sum(text.count(tokenizer.unk_token) for text in texts)
    if unknown <= UNKNOWN_SHARE * total:
        return None
    return f"{unknown / total:.1%} of the tokens are unknown to the tokenizer; is it the tokenizer of this model?"


def written_out(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: Format = "auto",
    chat_template: str | None = None,
    skip_bad_rows: bool = False,
    where: str = "",
) -> tuple[list[str], int]:
    """Documents as plain text, conversations through the chat template, and how many did not fit it.

    With `format="text"` the contents of the messages are read as they are, without a template.

    Raises: CompressError `data.no-chat-template`, `data.bad-row` when the template refuses a conversation.
    """
    if not texts.conversations:
        return list(texts.documents), 0
    if format == "text":
        return ["\n\n".join(message["content"] for message in messages) for messages in texts.conversations], 0
    template = None if chat_template is None else _template_file(chat_template, where)
    if template is None and not tokenizer.chat_template:
        raise CompressError(
            "data.no-chat-template",
            f"{texts.name} holds conversations, but the model's tokenizer has no chat template",
            where=where,
            fix="set `chat_template` to a Jinja file, or `format: text` to read the messages as plain text",
        )
    from jinja2 import TemplateError

    written: list[str] = []
    skipped = 0
    for number, messages in enumerate(texts.conversations, start=1):
        try:
            written.append(tokenizer.apply_chat_template(list(messages), tokenize=False, chat_template=template))
        except TemplateError as failure:
            if not skip_bad_rows:
                raise CompressError(
                    "data.bad-row",
                    f"{texts.name}: conversation {number} does not fit the chat template: {failure}",
                    where=where,
                    fix="correct it, or set `skip_bad_rows: true` to leave such rows out and count them",
                ) from failure
            skipped += 1
    return written, skipped


def _template_file(path: str, where: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        what = f"{path}: the chat template cannot be read ({failure})"
        raise CompressError("data.chat-template", what, where=where, fix="check the path") from failure
