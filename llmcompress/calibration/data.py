"""Calibration windows: full, equally long, never padded, chosen by seed. N = windows, T = tokens."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from llmcompress.calibration.generate import self_generated_text
from llmcompress.calibration.packing import pack, sections, windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.sources import TextSource, paragraph_hashes, read_texts
from llmcompress.calibration.templates import written_out
from llmcompress.calibration.tokens import starts_with_bos
from llmcompress.errors import CompressError
from llmcompress.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SECTION_CHARACTERS_PER_TOKEN = 8
"""About two windows of English a section: long enough that most windows have no seam in them."""


@dataclass(frozen=True)
class CalibrationData:
    """The windows that every pass measures on, and what had to be done to get them."""

    windows_NT: Tensor
    source: str
    fingerprint: str
    """sha256 of the text read (of the windows, for `self`)."""
    documents: int
    """Sections of text that the windows were cut from."""
    dropped_short: int = 0
    """Sections left out because they have fewer than `min_tokens` tokens."""
    skipped_rows: int = 0
    """Rows left out because they cannot be read."""
    bos: bool = False
    """Whether every window starts with a BOS, as the tokenizer does of its own accord."""
    paragraphs: frozenset[int] = frozenset()
    """Hashes of the paragraphs used, for the overlap check with evaluation texts."""
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """All tokens of all windows."""
        return self.windows_NT.numel()


def calibration_windows(
    settings: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int | None,
    seed: int,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> CalibrationData:
    """Read the source of `settings` and cut it into at most `samples` windows of `tokens` tokens.

    Documents longer than about two windows are cut at paragraphs; these sections are shuffled by `seed` (so a seed
    picks from the whole text), tokenised once, separated by the BOS or EOS, and packed. Windows begin with the BOS
    when the tokenizer adds one itself. `model` is needed for `source: self` only.

    Raises: CompressError `data.*` when there is not one full window, and everything `read_texts` raises.
    """
    progress = progress or Silent()
    length, warnings = _length(settings.tokens, max_positions)
    if settings.source == "self":
        data = _from_model(settings, length, tokenizer, model, seed, progress, warnings)
    else:
        data = _from_text(settings, length, tokenizer, seed, warnings)
    for warning in data.warnings:
        progress.note(f"calibration: {warning}")
    return data


def _length(tokens: int, max_positions: int | None) -> tuple[int, list[str]]:
    if max_positions is None or tokens <= max_positions:
        return tokens, []
    return max_positions, [f"windows shortened from {tokens} to {max_positions} tokens, the model's maximum"]


def _from_text(
    settings: Calibration, length: int, tokenizer: PreTrainedTokenizerBase, seed: int, warnings: list[str]
) -> CalibrationData:
    enough = settings.samples * length * SECTION_CHARACTERS_PER_TOKEN
    texts = read_texts(
        TextSource(settings.source, settings.split, settings.config, settings.column),
        format=settings.format,
        skip_bad_rows=settings.skip_bad_rows,
        max_characters=enough,
        where="calibration.source",
    )
    documents, refused = written_out(
        texts,
        tokenizer,
        format=settings.format,
        chat_template=settings.chat_template,
        skip_bad_rows=settings.skip_bad_rows,
        where="calibration",
    )
    size = length * SECTION_CHARACTERS_PER_TOKEN
    parts = [part for document in documents for part in sections(document, size)]
    random.Random(seed).shuffle(parts)
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    wanted = settings.samples * (length - len(bos))
    packed = pack(parts, tokenizer, bos, min_tokens=settings.min_tokens, wanted=wanted)
    windows_NT = windows(packed, settings, length, bos, name=texts.name)
    skipped = texts.skipped + refused
    if skipped:
        warnings.append(f"{skipped} rows of {texts.name} could not be read and were left out")
    if packed.unknown:
        warnings.append(packed.unknown)
    if len(windows_NT) < settings.samples:
        warnings.append(
            f"only {len(windows_NT)} of the {settings.samples} windows asked for: {texts.name} holds "
            f"{len(packed.tokens)} usable tokens, {wanted} are needed"
        )
    return CalibrationData(
        windows_NT,
        texts.name,
        texts.fingerprint,
        documents=len(packed.used),
        dropped_short=len(packed.short),
        skipped_rows=skipped,
        bos=bool(bos),
        paragraphs=paragraph_hashes(packed.used),
        warnings=tuple(warnings),
    )


def _from_model(
    settings: Calibration,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    seed: int,
    progress: Progress,
    warnings: list[str],
) -> CalibrationData:
    if model is None:
        raise CompressError(
            "data.self",
            "`source: self` samples text from the model, which needs the whole model in memory",
            where="calibration.source",
            fix="use another source, such as builtin:calibration",
        )
    windows_NT = self_generated_text(
        model, tokenizer, samples=settings.samples, tokens=length, seed=seed, batch=settings.batch, progress=progress
    )
    return CalibrationData(
        windows_NT,
        "self",
        hashlib.sha256(windows_NT.numpy().tobytes()).hexdigest(),
        documents=len(windows_NT),
        bos=starts_with_bos(tokenizer),
        warnings=tuple(warnings),
    )
