"""Rows of any table → plain texts or conversations: finds the column, checks every row, counts skipped rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from llmcompress.errors import CompressError

Message = dict[str, str]
"""`{"role": ..., "content": ...}`."""

Format = Literal["auto", "text", "chat"]

TEXT_COLUMNS = ("text", "content", "sentence")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
PAIR = "prompt+completion"

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT names its speakers differently; roles not listed are kept."""


class BadRow(ValueError):
    """A row that cannot be read; the message says what is wrong with it."""


@dataclass
class Contents:
    """What was read: either `documents` or `conversations` is filled."""

    documents: list[str] = field(default_factory=list)
    conversations: list[list[Message]] = field(default_factory=list)
    skipped: int = 0
    characters: int = 0


def contents_of(
    rows: Iterable[tuple[str, Any]],
    *,
    column: str | None,
    format: Format,
    skip_bad_rows: bool,
    where: str,
    max_characters: int | None = None,
) -> Contents:
    """Texts or conversations of `rows`, pairs of a label (`line 7`) and a string or a record.

    A row that is a `BadRow` was already found unreadable. Stops after `max_characters`.

    Raises: CompressError `data.columns` when no column fits, `data.bad-row` naming the first bad row.
    """
    found = Contents()
    columns: tuple[str, ...] | None = None
    for label, row in rows:
        if columns is None and isinstance(row, dict):
            columns = find_columns(list(row), column=column, format=format, where=where)
        try:
            _add(found, _value(row, columns or ()))
        except BadRow as bad:
            if not skip_bad_rows:
                raise CompressError(
                    "data.bad-row",
                    f"{label}: {bad}",
                    where=where,
                    fix="correct that row, or set `skip_bad_rows: true` to skip and count such rows",
                ) from None
            found.skipped += 1
        if max_characters is not None and found.characters >= max_characters:
            break
    return found


def find_columns(columns: list[str], *, column: str | None, format: Format, where: str) -> tuple[str, ...]:
    """The columns with the text or the messages; several are joined (`prompt+completion`).

    Raises: CompressError showing the columns there are.
    """
    if column is not None:
        wanted = (column,) if column in columns else tuple(column.split("+"))
        if all(name in columns for name in wanted):
            return wanted
        raise _no_column(f"there is no column {column!r}", columns, where)
    for names in _usual_names(format):
        if all(name in columns for name in names):
            return names
    raise _no_column(f"no column is known to hold {'messages' if format == 'chat' else 'text'}", columns, where)


def _usual_names(format: Format) -> Iterator[tuple[str, ...]]:
    chat, text = [(name,) for name in CHAT_COLUMNS], [(name,) for name in TEXT_COLUMNS]
    # messages first: a chat model's own template is better than a text column written for another model
    orders = {"auto": chat + text, "text": text + chat, "chat": chat}
    yield from orders[format]
    yield tuple(PAIR.split("+"))


def _no_column(what: str, columns: list[str], where: str) -> CompressError:
    return CompressError(
        "data.columns",
        f"{what}; columns found: {', '.join(columns) or 'none'}",
        where=where,
        fix="set `column` to the one to read (`column: a+b` joins two), or rename it to `text` or `messages`",
    )


def _value(row: Any, columns: tuple[str, ...]) -> str | list[Message]:
    """What one row holds."""
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, str):
        return row
    if isinstance(row, list):
        return conversation(row)
    if not isinstance(row, dict):
        raise BadRow(f"expected a record or a string, found {_kind(row)}")
    missing = [name for name in columns if row.get(name) is None]
    if missing:
        raise BadRow(f"no value in column {missing[0]!r}")
    parts = [row[name] for name in columns]
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    if all(isinstance(part, list) for part in parts):
        return [message for part in parts for message in conversation(part)]
    kinds = " and ".join(_kind(part) for part in parts)
    raise BadRow(f"column {'+'.join(columns)!r} holds {kinds}, not text or messages")


def conversation(messages: list[Any]) -> list[Message]:
    """Messages in any of the usual forms, as role and content.

    Raises: BadRow naming the first message that is none.
    """
    return [_message(message, number) for number, message in enumerate(messages, start=1)]


def _message(message: Any, number: int) -> Message:
    """A message in either of the two usual forms, as role and content."""
    if not isinstance(message, dict):
        raise BadRow(f"message {number} is {_kind(message)}, not {{role, content}}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    if not isinstance(role, str) or not isinstance(content, str):
        there = ", ".join(message) or "nothing"
        raise BadRow(f"message {number} needs role and content (or from and value), it has {there}")
    return {"role": _ROLES.get(role, role), "content": content}


def _add(found: Contents, value: str | list[Message]) -> None:
    if isinstance(value, str):
        if found.conversations:
            raise BadRow("plain text among conversations")
        found.documents.append(value)
        found.characters += len(value)
    else:
        if found.documents:
            raise BadRow("a conversation among plain texts")
        if value:
            found.conversations.append(value)
        found.characters += sum(len(message["content"]) for message in value)


def _kind(value: Any) -> str:
    names = {str: "text", dict: "a record", list: "a list", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
