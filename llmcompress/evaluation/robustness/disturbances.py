"""What is done to a prompt or a text to see how much a model depends on its exact letters and words."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from llmcompress.errors import CompressError, ExitCode, did_you_mean

PARAPHRASES = "paraphrases.yaml"

_PACKAGE = Path(__file__).parent.parent.parent


class Disturbance(Protocol):
    """Changes a text, always in the same way."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def __call__(self, text: str) -> str:
        """The changed text."""


@dataclass(frozen=True)
class CharacterNoise:
    """Typing errors: every letter is, with probability `rate`, exchanged with its successor, left out or doubled.

    The draws depend on the seed and the text alone: all choices of a question, and all models, see the same errors.
    """

    rate: float
    seed: int

    @property
    def name(self) -> str:
        """With its rate."""
        return f"noise:{self.rate:g}"

    def __call__(self, text: str) -> str:
        """Digits, punctuation and spaces stay."""
        digest = hashlib.sha256(f"{self.seed} {text}".encode()).digest()
        draws, changed, place = random.Random(digest), [], 0
        while place < len(text):
            letter, after = text[place], text[place + 1 : place + 2]
            place += 1
            if not letter.isalpha() or draws.random() >= self.rate:
                changed.append(letter)
                continue
            kind = draws.choice(("exchange", "leave out", "double"))
            if kind == "double":
                changed.append(2 * letter)
            elif kind == "exchange" and after.isalpha():
                changed.append(after + letter)
                place += 1
        return "".join(changed)


@dataclass(frozen=True)
class Paraphrase:
    """The same question in another form, by the first rule that fits."""

    name: str
    rules: tuple[tuple[str, str], ...]
    """Regular expression with named groups → template of what stands in its place."""

    def __call__(self, text: str) -> str:
        """Unchanged where no rule fits."""
        for pattern, template in self.rules:
            found, count = re.subn(pattern, lambda match: template.format(**match.groupdict()), text, flags=re.DOTALL)  # noqa: B023 (called at once)
            if count:
                return found
        return text


def prompt_folder() -> Path:
    """`evals/prompts` of a checkout, `llmcompress/evals/prompts` of an installed wheel."""
    inside = _PACKAGE / "evals" / "prompts"
    return inside if inside.is_dir() else _PACKAGE.parent / "evals" / "prompts"


def paraphrases(names: Sequence[str] | None) -> list[Paraphrase]:
    """Those of the bundled file (None: all).

    Raises: CompressError naming the nearest one.
    """
    written: Mapping[str, Sequence[Mapping[str, str]]] = yaml.safe_load(
        (prompt_folder() / PARAPHRASES).read_text(encoding="utf-8")
    )
    for name in names or ():
        if name not in written:
            raise CompressError(
                "robustness.unknown",
                f"unknown paraphrase {name!r}",
                where="evaluate.robustness",
                fix=did_you_mean(name, written),
                exit_code=ExitCode.USAGE,
            )
    chosen = written if names is None else names
    return [
        Paraphrase(f"prompt:{name}", tuple((rule["pattern"], rule["template"]) for rule in written[name]))
        for name in chosen
    ]
