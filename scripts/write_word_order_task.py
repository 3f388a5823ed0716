"""Write the bundled task: the true end of a sentence among orders of its words, from the bundled evaluation text.

    python scripts/write_word_order_task.py

Nothing is drawn at random: the same text gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "llmcompress" / "builtin" / "evaluation.txt"
TASK = ROOT / "evals" / "tasks" / "builtin_word_order.jsonl"

CONTEXT_CHARACTERS = 160
"""Of the story before the end of the sentence, cut to whole words."""

END_WORDS = 6
LEAST_WORDS = 9
"""Of a sentence: some of it must stand before its end."""

CHOICES = 4


def main() -> None:
    """Write the rows."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(TEXT.read_text(encoding="utf-8"))]
    TASK.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {TASK.relative_to(ROOT)}")


def rows(text: str) -> list[dict[str, object]]:
    """Every long sentence: the text before its last words, these words, and three orders with two neighbours exchanged.

    The first and the last of them stay, so that capitals and full stops give nothing away.
    """
    found: list[dict[str, object]] = []
    for sentence in re.finditer(r"\S.*?[.!?]+[\"']?(?=\s|$)", text, re.DOTALL):
        words = list(re.finditer(r"\S+", sentence.group()))
        if len(words) < LEAST_WORDS:
            continue
        begin = sentence.start() + words[-END_WORDS].start()
        end = [word.group() for word in words[-END_WORDS:]]
        places = sorted(range(1, END_WORDS - 2), key=lambda place: _mixed(f"{begin} {place}"))
        others = {_exchanged(end, place) for place in places} - {" ".join(end)}
        if len(others) < CHOICES - 1:
            continue
        choices = sorted(others, key=_mixed)[: CHOICES - 1]
        gold = _mixed(" ".join(end)) % CHOICES
        choices.insert(gold, " ".join(end))
        context = text[max(0, begin - CONTEXT_CHARACTERS) : begin].rstrip()
        cut = context if begin <= CONTEXT_CHARACTERS else context.partition(" ")[2]
        found.append({"id": len(found), "ctx": cut, "choices": choices, "gold": gold})
    return found


def _exchanged(words: list[str], place: int) -> str:
    """Word `place` and its successor exchanged."""
    return " ".join([*words[:place], words[place + 1], words[place], *words[place + 2 :]])


def _mixed(text: str) -> int:
    """A number that looks drawn at random and is always the same."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


if __name__ == "__main__":
    main()
