"""Samples from a file, a Hub dataset or given rows: packed text, prompts with responses, conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.calibration.context import ExampleRows
from llmcompress.calibration.hub_datasets import hub_dataset
from llmcompress.calibration.local_files import is_text_file, rows_of_file
from llmcompress.calibration.records import BadRow
from llmcompress.errors import CompressError
from llmcompress.storage.paths import from_home
from llmcompress.training.data.base import IndexedSamples, TrainingData
from llmcompress.training.data.encoders import Chat, Encoder, PromptResponse, Text
from llmcompress.training.data.packed import PackedStream, packed_windows
from llmcompress.training.data.rows import Rows, Stream, guarded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["text", "prompt", "chat"]
Part = Literal["text", "prompt", "response", "messages"]
_COLUMNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("chat", ("messages",)),
    ("prompt", ("prompt", "response")),
    ("prompt", ("prompt", "chosen")),
    ("text", ("text",)),
)
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class Examples(BaseModel):
    """Training examples and how to read them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = Field(min_length=1)
    """A .jsonl, .json, .parquet, .csv or .txt, or a Hub dataset."""
    split: str = Field(default="train", min_length=1)
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration of a Hub dataset."""
    kind: Kind = "text"
    """text: documents, packed into full windows; prompt: prompts and responses, with the loss on responses; chat:
    conversations in the model's chat template, with the loss on the assistant's turns."""
    columns: dict[Part, str] = Field(default_factory=dict)
    """The columns, if they do not have one of the usual names."""
    tokens: int = Field(default=512, ge=2)
    """Tokens per window of packed text; the maximum of any other sample, longer ones are truncated."""
    streaming: bool = False
    """Read row by row during training, for data that does not fit into memory. The paragraphs of a .txt are then its
    documents."""
    shuffle: int = Field(default=1000, ge=1)
    """Size of the shuffle buffer when streaming, in rows."""
    chat_template: str | None = None
    """A Jinja chat template file, for tokenizers that have none."""


def training_data(examples: Examples, tokenizer: PreTrainedTokenizerBase, *, where: str = "data") -> TrainingData:
    """Read the source; tokenised when a sample is asked for.

    Raises: CompressError `data.*` when it cannot be read, or has no such columns.
    """
    return samples(read_rows(examples, where=where), examples, tokenizer, where=where)


def read_rows(examples: Examples, *, where: str = "data") -> Any:
    """A `datasets.Dataset`, or with `streaming` an `IterableDataset`.

    Raises: CompressError `data.*` when the source cannot be found or read.
    """
    import datasets

    path = from_home(examples.source)
    if not path.is_file():
        if is_text_file(examples.source):
            what = f"{examples.source}: no such file"
            raise CompressError("data.not-found", what, where=where, fix="check the path")
        return hub_dataset(
            examples.source, split=examples.split, config=examples.config, streaming=examples.streaming, where=where
        )
    if examples.streaming:
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            what = f"{path.name}: rows cannot be streamed from this file type"
            raise CompressError("data.file-type", what, where=where, fix=f"use one of {', '.join(_BUILDERS)}")
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        return datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
    rows = []
    for label, row in rows_of_file(path, where=where):
        if isinstance(row, BadRow):
            raise CompressError("data.bad-row", f"{label}: {row}", where=where, fix="correct that row")
        rows.append({"text": row} if isinstance(row, str) else {"messages": row} if isinstance(row, list) else row)
    if not rows:
        raise CompressError("data.empty", f"{path.name}: the file has no rows", where=where, fix="use another source")
    return _dataset(rows, path.name, where)


def _dataset(rows: list[dict[str, Any]], name: str, where: str) -> Any:
    """Raises: CompressError `data.bad-row` where the rows do not go together."""
    import datasets

    try:
        return datasets.Dataset.from_list(rows)
    except Exception as failure:  # pyarrow's errors share no type
        what = f"{name}: the columns have different types in different rows: {failure}"
        raise CompressError("data.bad-row", what, where=where, fix="give all rows the same columns") from failure


def samples(rows: Any, examples: Examples, tokenizer: PreTrainedTokenizerBase, *, where: str = "data") -> TrainingData:
    """Samples of rows at hand, a `Dataset` or an `IterableDataset`, whatever `examples.source` says.

    Raises: CompressError `data.columns` showing the columns there are, `data.no-chat-template`.
    """
    import datasets

    encoder = _encoder(rows, examples, tokenizer, where)
    streamed = isinstance(rows, datasets.IterableDataset)
    if isinstance(encoder, Text):
        if streamed:
            return PackedStream(rows, encoder, examples.tokens, shuffle=examples.shuffle)
        return packed_windows(rows, encoder, examples.tokens)
    return Stream(rows, encoder, shuffle=examples.shuffle) if streamed else Rows(rows, encoder)


def samples_of_rows(given: ExampleRows) -> IndexedSamples:
    """Samples of rows that `data` steps made: conversations, prompts with responses, or packed text, as they have it.

    Raises: CompressError `data.columns` where the rows are none of these, and as `samples` does.
    """
    kind, columns = _kind_of(given.rows)
    rows = _dataset([{column: row[column] for column in columns} for row in given.rows], "data", "data")
    named: dict[Part, str] = {"response": columns[1]} if kind == "prompt" else {}
    examples = Examples(source="data", kind=kind, columns=named, tokens=given.tokens, chat_template=given.chat_template)
    found = samples(rows, examples, given.tokenizer, where="data")
    assert isinstance(found, IndexedSamples), "a dataset in memory has numbered rows"
    return found


def _kind_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Kind, tuple[str, ...]]:
    """The kind of which every row has the columns."""
    for kind, columns in _COLUMNS:
        if all(column in row for row in rows for column in columns):
            return kind, columns
    there = ", ".join(sorted({name for row in rows for name in row}))
    raise CompressError(
        "data.columns",
        f"rows have no examples to train on; columns found: {there}",
        where="data",
        fix="the last step must leave `text`, `prompt` with `response`, or `messages` in every row: try `label`",
    )


def _encoder(rows: Any, examples: Examples, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoder:
    there = list(rows.column_names or next((row for _, row in guarded(rows)), {}))
    kinds: dict[str, type[Text] | type[PromptResponse] | type[Chat]]
    kinds = {"text": Text, "prompt": PromptResponse, "chat": Chat}
    wanted = kinds[examples.kind]
    strange = sorted(examples.columns.keys() - wanted.columns.keys())
    if strange:
        raise CompressError(
            "data.columns",
            f"`kind: {examples.kind}` does not use a column {strange[0]!r}",
            where=where,
            fix=f"name {' and '.join(wanted.columns)}",
        )
    found = {}
    for part, usual in wanted.columns.items():
        names = (examples.columns[part],) if part in examples.columns else usual
        name = next((name for name in names if name in there), None)
        if name is None:
            raise CompressError(
                "data.columns",
                f"no column for the {part} ({' or '.join(names)}); columns found: {', '.join(there) or 'none'}",
                where=where,
                fix=f"set `columns: {{{part}: NAME}}`",
            )
        found[part] = name
    return wanted(tokenizer, found, examples, where)
