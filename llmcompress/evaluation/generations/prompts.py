"""Prompts from files of the usual forms, with the instructions whose outcome a program can verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmcompress.calibration.local_files import rows_of_file
from llmcompress.calibration.records import BadRow, conversation
from llmcompress.errors import CompressError
from llmcompress.evaluation.generations.checks import Check, checks_of
from llmcompress.evaluation.robustness.disturbances import prompt_folder
from llmcompress.evaluation.settings.generations import BUNDLED_PROMPTS
from llmcompress.storage.paths import from_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHERE = "evaluate.generations"


@dataclass(frozen=True)
class Prompt:
    """What a model continues."""

    text: str
    checks: tuple[Check, ...] = ()


def read_prompts(source: str, limit: int | None) -> list[Prompt]:
    """The first prompts of a file.

    Raises: CompressError when it cannot be read, or a row holds no prompt.
    """
    bundled = source == BUNDLED_PROMPTS
    path = prompt_folder() / "instructions.jsonl" if bundled else from_home(source)
    found = []
    for label, row in islice(rows_of_file(path, where=WHERE), limit):
        try:
            found.append(_prompt(row))
        except BadRow as bad:
            fix = "give rows with `prompt`, `instruction`, `turns` or `messages`"
            raise CompressError("data.bad-row", f"{label}: {bad}", where=f"{WHERE}: {source}", fix=fix) from None
    if not found:
        raise CompressError("data.empty", f"{source}: no prompts", where=WHERE, fix="use another file")
    return found


def _prompt(row: Any) -> Prompt:
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, str):
        return Prompt(row)
    if not isinstance(row, Mapping):
        raise BadRow("it is neither text nor a record")
    text = next((found for form in _FORMS if (found := form(row))), None)
    if text is None:
        raise BadRow(f"no prompt in its columns {', '.join(map(str, row))}")
    return Prompt(text, checks_of(row.get("instruction_id_list") or [], row.get("kwargs") or []))


def _plain(row: Mapping[str, Any]) -> str | None:
    return next((row[name] for name in ("prompt", "text") if isinstance(row.get(name), str)), None)


def _turns(row: Mapping[str, Any]) -> str | None:
    """MT-Bench and Vicuna."""
    turns = row.get("turns")
    return str(turns[0]) if isinstance(turns, Sequence) and turns else None


def _instruction(row: Mapping[str, Any]) -> str | None:
    """Alpaca, and Self-Instruct with its `instances`."""
    instruction, instances = row.get("instruction"), row.get("instances")
    if not isinstance(instruction, str):
        return None
    given = instances[0].get("input") if isinstance(instances, list) and instances else row.get("input")
    return f"{instruction}\n\n{given}" if given else instruction


def _messages(row: Mapping[str, Any]) -> str | None:
    """The first message of the user."""
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list):
        return None
    return next((each["content"] for each in conversation(messages) if each["role"] == "user"), None)


_FORMS = (_plain, _turns, _instruction, _messages)


def tokens_of(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> list[int]:
    """As the model reads it: in its chat template, or as plain text as the tokenizer does by default."""
    tokens: list[int]
    if not chat:
        tokens = tokenizer.encode(prompt.text)
        return tokens
    message = [{"role": "user", "content": prompt.text}]
    written = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.encode(written, add_special_tokens=False)
    return tokens
