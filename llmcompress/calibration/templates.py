"""Conversations → text through a chat template, which is a program from the model's author and runs with limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from llmcompress.calibration.records import Format, Message
from llmcompress.calibration.sources import Texts
from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.storage.paths import from_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_LINES = 1_000_000
"""That a template may run for one conversation: about a second."""

MOST_BYTES = 10**9
"""That a template may take for one conversation."""

TraceFunction = Callable[[FrameType, str, Any], Any]


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
    template = None if chat_template is None else template_file(chat_template, where)
    if template is None and not tokenizer.chat_template:
        raise CompressError(
            "data.no-chat-template",
            f"{texts.name} holds conversations, but the model's tokenizer has no chat template",
            where=where,
            fix="set `chat_template` to a Jinja file, or `format: text` to read the messages as plain text",
        )
    written: list[str] = []
    skipped = 0
    for number, messages in enumerate(texts.conversations, start=1):
        try:
            written.append(_rendered(messages, tokenizer, template))
        except Exception as failure:  # a template is a program of the model's author
            if is_out_of_memory(failure):
                raise
            if not skip_bad_rows:
                raise CompressError(
                    "data.bad-row",
                    f"{texts.name}: conversation {number} does not fit the chat template: {template_message(failure)}",
                    where=where,
                    fix="correct it, or set `skip_bad_rows: true` to skip and count such rows",
                ) from failure
            skipped += 1
    return written, skipped


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    with within_limits():
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, chat_template=template)
    return text


@contextmanager
def within_limits() -> Iterator[None]:
    """What a template does meanwhile is bounded; one that does more ends with a ValueError."""
    with _bounded_memory(), _bounded_lines():
        yield


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """`{{ 'x' * 10**10 }}` is one line, and Jinja's sandbox lets it pass: the system refuses the memory meanwhile.

    Linux keeps to this limit; on other systems only lines are bounded.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + MOST_BYTES
    lowest = min(value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    except MemoryError as problem:
        raise ValueError(f"it takes more than {MOST_BYTES // 10**6:,} MB of memory") from problem
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _bounded_lines() -> Iterator[None]:
    """Ends a template after so many lines. Jinja's sandbox bounds each `range`, not how many stand inside each other.

    A template is compiled to Python, so Python can count its lines; other code is not looked at.
    """
    left = MOST_LINES

    def each_line(frame: FrameType, event: str, _: object) -> TraceFunction:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise ValueError(f"it runs for more than {MOST_LINES:,} lines")
        return each_line

    def each_call(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        return each_line if frame.f_code.co_filename.startswith("<template") else None

    before = sys.gettrace()
    sys.settrace(each_call)
    try:
        yield
    finally:
        sys.settrace(before)


def template_message(failure: Exception) -> str:
    """What a template raised, in one line."""
    return str(failure).strip().partition("\n")[0] or type(failure).__name__


def template_file(path: str, where: str) -> str:
    """A chat template in a file of its own.

    Raises: CompressError when it cannot be read.
    """
    try:
        return from_home(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        what = f"{path}: the chat template cannot be read ({failure})"
        raise CompressError("data.chat-template", what, where=where, fix="check the path") from failure
