"""What calibration gives to passes; and the windows of token ids that the user made. N = windows, T = tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibration.in_memory import TokenRows
from llmcompress.calibration.packing import Packed, separator_of, windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.sources import paragraph_hashes
from llmcompress.calibration.tokens import starts_with_bos
from llmcompress.errors import CompressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CalibrationData:
    """The windows that every pass measures on, and what had to be done to get them."""

    windows_NT: Tensor
    source: str
    fingerprint: str
    """sha256 of the text read (of the windows, for `self`; of the token ids, where those were given)."""
    documents: int
    """Sections of text that the windows were cut from."""
    dropped_short: int = 0
    """Sections left out because they have fewer than `min_tokens` tokens."""
    skipped_rows: int = 0
    """Rows left out because they cannot be read."""
    held_out_NT: Tensor | None = None
    """Further windows, which no pass measures; None where none were asked for, or no text was left."""
    bos: bool = False
    """Whether every window starts with a BOS, as the tokenizer's default."""
    paragraphs: frozenset[int] = frozenset()
    """Hashes of the paragraphs used, for the overlap check with evaluation texts."""
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """All tokens of all windows."""
        return self.windows_NT.numel()


def windows_of_tokens(
    given: TokenRows,
    settings: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int | None,
    held_out: int = 0,
) -> CalibrationData:
    """Rows of one length are windows as they are, in their order; others are joined and cut like text.

    What is held out stands behind the `samples` that are measured.

    Raises: CompressError when rows seem to be padded and no mask says where, or there is not one full window.
    """
    if not given.masked:
        _refuse_padding(given, tokenizer)
    data = _windows(given, settings, tokenizer, max_positions, held_out)
    if held_out and data.held_out_NT is None:
        what = "no rows are left behind those that are measured: nothing is held out to check the result on"
        data = replace(data, warnings=(*data.warnings, what))
    return data


def _windows(
    given: TokenRows,
    settings: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None,
    held_out: int,
) -> CalibrationData:
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    lengths = {len(row) for row in given.rows}
    longest = max_positions or max(lengths)
    if len(lengths) == 1 and 2 <= max(lengths) <= longest:
        used = list(given.rows[: settings.samples + held_out])
        return _data(given, torch.tensor(used), used, tokenizer, settings)
    length = min(settings.tokens, longest)
    packed, used = Packed(), []
    for row in given.rows:
        before = len(packed.used)
        packed.add(list(row), bos, separator_of(tokenizer, bos), min_tokens=settings.min_tokens, text="")
        used += [row] * (len(packed.used) - before)
    all_NT = windows(packed, settings, length, bos, name=given.name, held_out=held_out)
    why = "differ in length" if len(lengths) > 1 else "are longer than the model has positions"
    told = f"the rows of token ids {why}: they were joined and cut into windows of {length} tokens"
    data = _data(given, all_NT, used, tokenizer, settings)
    return replace(data, warnings=(told, *data.warnings), dropped_short=len(packed.short))


def _data(
    given: TokenRows,
    all_NT: Tensor,
    used: list[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Calibration,
) -> CalibrationData:
    windows_NT, held_out_NT = all_NT[: settings.samples], all_NT[settings.samples :]
    begins = tokenizer.bos_token_id is not None and bool((windows_NT[:, 0] == tokenizer.bos_token_id).all())
    return CalibrationData(
        windows_NT,
        given.name,
        given.fingerprint,
        documents=len(used),
        held_out_NT=held_out_NT if len(held_out_NT) else None,
        bos=begins,
        paragraphs=paragraph_hashes(tokenizer.decode(list(row), skip_special_tokens=True) for row in used),
        warnings=tuple(_too_few(len(windows_NT), settings, given)),
    )


def _too_few(found: int, settings: Calibration, given: TokenRows) -> list[str]:
    if found >= settings.samples:
        return []
    return [f"only {found} of the {settings.samples} windows asked for: {given.name} holds no more"]


def _refuse_padding(given: TokenRows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows that begin or end with padding tokens; a single one may be the end of a text.

    Raises: CompressError naming the first such row.
    """
    padding = tokenizer.pad_token_id
    if padding is None:
        return
    for number, row in enumerate(given.rows, start=1):
        if row[:2] == (padding, padding) or row[-2:] == (padding, padding):
            raise CompressError(
                "data.padding",
                f"row {number} begins or ends with padding ({tokenizer.pad_token!r}), which must not be measured",
                where="calibration",
                fix="give the attention_mask beside input_ids, or rows without padding",
            )
