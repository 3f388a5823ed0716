"""One row → one sample: its tokens, and which of them are learned. T = tokens."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from typing_extensions import override

from llmcompress.calibration.records import CHAT_COLUMNS, TEXT_COLUMNS, BadRow, Message, conversation
from llmcompress.calibration.templates import template_file, template_message, within_limits
from llmcompress.calibration.tokens import starts_with_bos, token_lists
from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.training.data.batch import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\b")
"""A chat template that itself says which parts the assistant writes."""


class Options(Protocol):
    """What an encoder reads of `Examples`."""

    @property
    def tokens(self) -> int:
        """The most in a sample."""

    @property
    def chat_template(self) -> str | None:
        """A file with a template."""


class Encoder(ABC):
    """How rows of one kind become samples."""

    columns: ClassVar[Mapping[str, tuple[str, ...]]]
    """What a row must hold, and the usual names of the columns for it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, str], options: Options, where: str
    ) -> None:
        self.tokenizer, self._columns, self._options, self._where = tokenizer, columns, options, where
        self.bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []

    def __call__(self, number: int, row: Mapping[str, Any]) -> Sample:
        """The sample of row `number` (from 0).

        Raises: CompressError `data.bad-row`.
        """
        with self._row(number):
            pieces = self.pieces(row)
        ids = [token for tokens, _ in pieces for token in tokens][: self._options.tokens]
        learned = [learns for tokens, learns in pieces for _ in tokens][: self._options.tokens]
        return Sample(torch.tensor(ids, dtype=torch.long), torch.tensor(learned, dtype=torch.bool))

    @contextmanager
    def _row(self, number: int) -> Iterator[None]:
        """Says which row is a bad one."""
        try:
            yield
        except BadRow as bad:
            raise CompressError(
                "data.bad-row", f"row {number + 1}: {bad}", where=self._where, fix="correct or remove that row"
            ) from None

    @abstractmethod
    def pieces(self, row: Mapping[str, Any]) -> list[tuple[list[int], bool]]:
        """Token ids in order, and whether they are learned.

        Raises: BadRow.
        """

    @property
    def fingerprint(self) -> str:
        """The same for encoders that make the same samples of the same rows."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        facts = (type(self).__name__, self._columns, self._options.tokens, vocabulary, self.template)
        return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def template(self) -> str | None:
        """The chat template, where one is used."""
        return None

    def text(self, row: Mapping[str, Any], part: str) -> str:
        """A column that must hold text.

        Raises: BadRow.
        """
        value = row.get(self._columns[part])
        if not isinstance(value, str):
            kind = "nothing" if value is None else type(value).__name__
            raise BadRow(f"column {self._columns[part]!r} holds {kind}, not text")
        return value


class Text(Encoder):
    """A document; all of it is learned. `packed.py` joins documents into windows."""

    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": TEXT_COLUMNS}

    def document(self, number: int, row: Mapping[str, Any]) -> str:
        """The text of row `number` (from 0).

        Raises: CompressError `data.bad-row`.
        """
        with self._row(number):
            return self.text(row, "text")

    @override
    def pieces(self, row: Mapping[str, Any]) -> list[tuple[list[int], bool]]:
        return [(token_lists(self.tokenizer, [self.text(row, "text")])[0], True)]


class PromptResponse(Encoder):
    """A prompt and the response to it, nothing between them; the end of text belongs to the response.

    They are tokenised apart: a model that answers gets the prompt's tokens, not those of both.
    """

    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("prompt", "instruction", "question"),
        "response": ("response", "completion", "output", "answer"),
    }

    @override
    def pieces(self, row: Mapping[str, Any]) -> list[tuple[list[int], bool]]:
        prompt, response = token_lists(self.tokenizer, [self.text(row, "prompt"), self.text(row, "response")])
        end = [self.tokenizer.eos_token_id] * (self.tokenizer.eos_token_id is not None)
        return [(self.bos + prompt, False), (response + end, True)]


class Chat(Encoder):
    """A conversation in the chat template; what the assistant writes is learned, with whatever ends its turn."""

    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {"messages": CHAT_COLUMNS}

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, str], options: Options, where: str
    ) -> None:
        super().__init__(tokenizer, columns, options, where)
        self._known_to_end: set[int] = set()
        self._template = (
            template_file(options.chat_template, where) if options.chat_template else tokenizer.chat_template
        )
        if not self._template:
            raise CompressError(
                "data.no-chat-template",
                "the rows are conversations, but the model's tokenizer has no chat template",
                where=where,
                fix="set `chat_template` to a Jinja file",
            )

    @property
    @override
    def template(self) -> str | None:
        return str(self._template)

    @override
    def pieces(self, row: Mapping[str, Any]) -> list[tuple[list[int], bool]]:
        value = row.get(self._columns["messages"])
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise BadRow(f"column {self._columns['messages']!r} holds no messages")
        messages = conversation(list(value))
        # counting lines costs several times the rendering: a text is looked at once, not in every epoch
        text = hash(repr(messages))
        with nullcontext() if text in self._known_to_end else self._foreign():
            pieces = self._marked(messages) if _MARKS.search(str(self._template)) else self._by_turns(messages)
        self._known_to_end.add(text)
        return pieces

    @contextmanager
    def _foreign(self) -> Iterator[None]:
        """A template is a program of the model's author: whatever it raises is a row that does not fit."""
        try:
            with within_limits():
                yield
        except Exception as failure:
            if isinstance(failure, BadRow) or is_out_of_memory(failure):
                raise
            raise BadRow(f"the conversation does not fit the chat template: {template_message(failure)}") from failure

    def _marked(self, messages: list[Message]) -> list[tuple[list[int], bool]]:
        """By the marks of the template."""
        found = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        return [([token], bool(learns)) for token, learns in pairs]

    def _by_turns(self, messages: list[Message]) -> list[tuple[list[int], bool]]:
        """Cut where the assistant is asked to write and where its turn ends, as in a real conversation.

        Raises: BadRow where the template writes earlier turns differently once later ones follow.
        """
        whole = self._written(messages)
        cuts: list[tuple[int, bool]] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self._written(messages[:index], ask=True)
                answered = self._written(messages[: index + 1])
                if not whole.startswith(asked) or not whole.startswith(answered):
                    raise BadRow(
                        "the chat template renders earlier turns differently when later ones follow; "
                        "mark the assistant's part with {% generation %}"
                    )
                cuts += [(len(asked), False), (len(answered), True)]
        cuts.append((len(whole), False))
        starts = [0, *(end for end, _ in cuts)]
        texts = [whole[start:end] for start, (end, _) in zip(starts, cuts, strict=False)]
        return list(zip(token_lists(self.tokenizer, texts), (learns for _, learns in cuts), strict=True))

    def _written(self, messages: list[Message], *, ask: bool = False) -> str:
        if not messages:
            return ""
        written: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=ask
        )
        return written
