"""Instructions whose outcome a program can verify, under the names and arguments of IFEval.

Source: Zhou et al., arXiv 2311.07911, table 1. Differs: sentences are split at full stops, not by nltk, and only the
kinds below are verified; lm-eval's task `ifeval` has all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One instruction and its arguments."""

    kind: str
    arguments: Mapping[str, Any]

    def follows(self, text: str) -> bool:
        """Whether the text does what the instruction says. An empty text follows none."""
        return bool(text.strip()) and _KINDS[self.kind](text, self.arguments)


def checks_of(kinds: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]) -> tuple[Check, ...]:
    """Those of a row's `instruction_id_list` and `kwargs` that can be verified here."""
    padded = [*arguments, *[{}] * (len(kinds) - len(arguments))]
    return tuple(Check(kind, each or {}) for kind, each in zip(kinds, padded, strict=False) if kind in _KINDS)


def _compares(count: int, relation: str, wanted: int) -> bool:
    """IFEval knows two relations."""
    return count < wanted if relation == "less than" else count >= wanted


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _is_json(text: str) -> bool:
    inside = re.sub(r"^```(json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inside)
    except ValueError:
        return False
    return True


_KINDS: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "keywords:existence": lambda text, its: all(_has_word(text, word) for word in its["keywords"]),
    "keywords:forbidden_words": lambda text, its: not any(_has_word(text, word) for word in its["forbidden_words"]),
    "keywords:frequency": lambda text, its: _compares(
        len(re.findall(re.escape(its["keyword"]), text, re.IGNORECASE)), its["relation"], its["frequency"]
    ),
    "length_constraints:number_words": lambda text, its: _compares(
        len(re.findall(r"\w+", text)), its["relation"], its["num_words"]
    ),
    "length_constraints:number_sentences": lambda text, its: _compares(
        len(re.findall(r"[^.!?\s][^.!?]*", text)), its["relation"], its["num_sentences"]
    ),
    "detectable_format:number_bullet_lists": lambda text, its: (
        len(re.findall(r"^\s*[*-](?!\*)", text, re.MULTILINE)) == its["num_bullets"]
    ),
    "detectable_format:json_format": lambda text, its: _is_json(text),
    "detectable_format:title": lambda text, its: re.search(r"<<[^\n<>]*\S[^\n<>]*>>", text) is not None,
    "change_case:english_lowercase": lambda text, its: text.islower(),
    "change_case:english_capital": lambda text, its: text.isupper(),
    "punctuation:no_comma": lambda text, its: "," not in text,
    "startend:end_checker": lambda text, its: (
        text.strip().strip('"').lower().endswith(its["end_phrase"].strip().lower())
    ),
    "startend:quotation": lambda text, its: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
}
