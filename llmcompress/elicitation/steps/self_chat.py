"""`self_chat`: conversations of a model with itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools, text_of, units_of
from llmcompress.elicitation.steps.answering import Writing, batch_of

_HUMAN, _AI = "[|Human|]", "[|AI|]"
_TURN = re.compile(r"\[\|(Human|AI)\|\]")
_ROLES = {"Human": "user", "AI": "assistant"}


@STEPS.register("self_chat")
class SelfChat(Writing):
    """The model writes both sides of a conversation that begins with the prompt; it is cut into turns by their marks.

    Conversations end with an answer; those without one are dropped.

    Source: Xu et al., arXiv 2304.01196, section 3.1 and appendix A (Baize).
    """

    form: Literal["chat", "text"] = "chat"
    """chat: rows with `messages`, which need a chat template when a student learns from them; text: the conversation as
    one text with the paper's marks."""
    heading: str = (
        "The following is a conversation between a human and an AI assistant. The human and the AI assistant take "
        "turns chatting. Human statements start with [|Human|] and AI assistant statements start with [|AI|]. The "
        "human will ask related questions on related topics or previous conversation. The human will stop the "
        "conversation when they have no more question. The AI assistant tries not to ask questions."
    )
    """What stands before the conversation."""

    @override
    def units(self, given: Sequence[Row]) -> int:
        return units_of(len(given), self.batch)

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        topics = [text_of(row, "prompt", step="self_chat") for row in batch_of(self, given, number)]
        begun = [f"{_HUMAN} {' '.join(topic.split())}\n{_AI}" for topic in topics]
        head = f"{self.heading}\n\n" if self.heading else ""
        written = tools.author(self.by).continued([head + text for text in begun], self.drawing(tools))
        found = []
        for text, more in zip(begun, written, strict=True):
            messages = turns(text + more)
            if len(messages) < 2:
                continue
            plain = "\n".join(f"{_HUMAN if m['role'] == 'user' else _AI} {m['content']}" for m in messages)
            found.append({"messages": messages} if self.form == "chat" else {"text": plain})
        return found


def turns(text: str) -> list[dict[str, str]]:
    """The messages of a conversation up to the last answer: in turn, none of them empty."""
    parts = _TURN.split(text)
    found: list[dict[str, str]] = []
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        wanted = "Human" if len(found) % 2 == 0 else "AI"
        if name != wanted or not content.strip():
            break
        found.append({"role": _ROLES[name], "content": content.strip()})
    return found[: len(found) // 2 * 2]
