"""Calibration data that the user has in memory: texts, conversations, rows of a dataset, or batches of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.records import contents_of
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.sources import Texts, texts_of
from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.source import IN_MEMORY

WHERE = "calibration"
CHARACTERS_PER_TOKEN = 8
"""As many are read of a stream for every token that is wanted, as of a dataset of the Hub."""


@dataclass(frozen=True)
class TokenRows:
    """Token ids that the user made: one text or window in a row, padding left out."""

    name: str
    rows: tuple[tuple[int, ...], ...]
    fingerprint: str
    masked: bool
    """Whether an attention mask said what is padding; without one nothing was left out."""


GivenData = Texts | TokenRows


def as_calibration(given: Any, settings: Calibration, *, held_out: int = 0) -> tuple[Calibration, GivenData | None]:
    """What the user gave as calibration, over the recipe's settings: settings, and the data if they are in memory.

    Of batches of token ids as many windows are read as are measured, and `held_out` more.

    None: the recipe's. A dictionary changes single settings, a text or path the source. Lists are read whole; of a
    dataset, a DataLoader or a generator only as much as is needed is taken, from the beginning. The source of data in
    memory is called by their kind and a hash, so that a recipe tells which they were.

    Raises: CompressError for anything that holds neither text nor token ids.
    """
    if given is None:
        return settings, None
    if isinstance(given, Calibration):
        return given, None
    if isinstance(given, str | Path):
        return _changed(settings, {"source": str(given)}), None
    if type(given).__name__ in ("DatasetDict", "IterableDatasetDict"):
        raise _refused(
            "data.split", f"this is a {type(given).__name__} of {', '.join(given)}", 'give one: dataset["train"]'
        )
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            return _changed(settings, dict(given)), None
        given = [given]
    if not isinstance(given, Iterable):
        raise _unusable(given)
    data = _read(given, settings, held_out)
    return _changed(settings, {"source": data.name}), data


def _changed(settings: Calibration, changes: dict[str, Any]) -> Calibration:
    from pydantic import ValidationError

    try:
        return Calibration.model_validate({**settings.model_dump(), **changes})
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(Calibration.model_fields)
        raise _refused("recipe.value", f"calibration: {key}: {first['msg']}", f"use the settings {known}") from None


def _read(given: Iterable[Any], settings: Calibration, held_out: int) -> GivenData:
    """Texts or tokens: the first item says which."""
    items = iter(given)
    first = next(items, None)
    if first is None:
        raise _refused("data.empty", "the calibration data are empty", "give some text, or leave `calibration` out")
    kind = "texts" if isinstance(given, list | tuple) else type(given).__name__
    if _is_message(first) and isinstance(given, list | tuple):
        return _texts(iter([list(given)]), kind, settings, whole=True)  # one conversation
    if _holds_ids(first):
        return _tokens(chain([first], items), settings.samples + held_out, settings.tokens)
    if not isinstance(first, str | dict | list):
        raise _unusable(first)
    return _texts(chain([first], items), kind, settings, whole=isinstance(given, list | tuple))


def _texts(rows: Iterator[Any], kind: str, settings: Calibration, *, whole: bool) -> Texts:
    found = contents_of(
        ((f"row {number}", row) for number, row in enumerate(rows, start=1)),
        column=settings.column,
        format=settings.format,
        skip_bad_rows=settings.skip_bad_rows,
        where=WHERE,
        max_characters=None if whole else settings.samples * settings.tokens * CHARACTERS_PER_TOKEN,
    )
    texts = texts_of(found, f"{IN_MEMORY}{kind}", where=WHERE)
    return replace(texts, name=f"{texts.name}:{texts.fingerprint[:16]}")


def _tokens(batches: Iterator[Any], windows: int, tokens: int) -> TokenRows:
    rows: list[tuple[int, ...]] = []
    masked = True
    total = 0
    for batch in batches:
        ids_BT, mask_BT = _ids(batch)
        masked &= mask_BT is not None
        for row, ids in enumerate(ids_BT):
            kept = ids if mask_BT is None else _unpadded(ids, mask_BT[row], len(rows) + 1)
            rows.append(tuple(kept.tolist()))
            total += len(rows[-1])
        if total >= windows * tokens or (len(rows) >= windows and len(set(map(len, rows))) == 1):
            break
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    return TokenRows(f"{IN_MEMORY}tokens:{digest[:16]}", tuple(rows), digest, masked)


def _ids(batch: Any) -> tuple[list[Tensor], list[Tensor] | None]:
    """The rows of one batch, and of its attention mask."""
    mask = None
    if isinstance(batch, Mapping):
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    if isinstance(batch, list | tuple) and len(batch) == 1 and isinstance(batch[0], Tensor) and batch[0].dim() == 2:
        batch = batch[0]  # as a DataLoader over a TensorDataset gives it
    rows = _rows(batch)
    if mask is None:
        return rows, None
    masks = [row.ne(0).long() for row in _rows(mask, whole_numbers=False)]
    if [len(row) for row in rows] != [len(row) for row in masks]:
        raise _refused(
            "data.mask", "attention_mask has another shape than input_ids", "give one 0 or 1 for every token"
        )
    return rows, masks


def _rows(value: Any, *, whole_numbers: bool = True) -> list[Tensor]:
    """One tensor of numbers for every row.

    Raises: CompressError for anything but one or several rows of them.
    """
    try:
        many = isinstance(value, list | tuple) and len(value) > 0 and not isinstance(value[0], int)
        rows = [torch.as_tensor(row) for row in value] if many else _as_rows(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError) as problem:
        raise _refused("data.tokens", f"token ids cannot be read: {problem}", _ROWS) from None
    if any(row.dim() != 1 or row.is_complex() for row in rows) or (
        whole_numbers and any(row.is_floating_point() or bool((row < 0).any()) for row in rows)
    ):
        raise _refused("data.tokens", "input_ids must be rows of whole numbers from 0", _ROWS)
    return rows


def _as_rows(tensor: Tensor) -> list[Tensor]:
    return list(tensor[None] if tensor.dim() < 2 else tensor)


_ROWS = "give tensors of batch × tokens, or dictionaries with input_ids and attention_mask"


def _unpadded(ids_T: Tensor, mask_T: Tensor, number: int) -> Tensor:
    """The tokens that the mask shows."""
    (places,) = torch.nonzero(mask_T, as_tuple=True)
    if len(places) and int(places[-1] - places[0]) + 1 != len(places):
        what = f"row {number}: the attention mask hides tokens in the middle of a text"
        raise _refused(
            "data.mask", what, "padding may stand before or behind a text; give several texts as several rows"
        )
    return ids_T[places]


def _holds_ids(item: Any) -> bool:
    """Whether an item is a batch, or a row, of token ids."""
    if isinstance(item, Mapping):
        return "input_ids" in item
    while isinstance(item, list | tuple) and len(item):
        item = item[0]
    return (
        isinstance(item, Tensor) or (isinstance(item, int) and not isinstance(item, bool)) or hasattr(item, "__array__")
    )


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and bool({"role", "from"} & item.keys()) and bool({"content", "value"} & item.keys())


def _unusable(value: Any) -> CompressError:
    return _refused(
        "data.kind",
        f"calibration data cannot be read from a {type(value).__name__}",
        "give a list of texts, conversations, a datasets.Dataset, batches of input_ids, or settings such as "
        '{"source": "my.txt", "samples": 64}',
    )


def _refused(code: str, what: str, fix: str) -> CompressError:
    return CompressError(code, what, where=WHERE, fix=fix, exit_code=ExitCode.USAGE)
