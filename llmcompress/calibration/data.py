"""Calibration windows: full, equally long, never padded, chosen by seed. N = windows, T = tokens."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

from torch import Tensor

from llmcompress.calibration.generate import self_generated_text
from llmcompress.calibration.in_memory import GivenData, TokenRows
from llmcompress.calibration.packing import pack, sections, windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.sources import Texts, TextSource, paragraph_hashes, read_texts
from llmcompress.calibration.templates import written_out
from llmcompress.calibration.token_windows import CalibrationData, windows_of_tokens
from llmcompress.calibration.tokens import starts_with_bos
from llmcompress.errors import CompressError
from llmcompress.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SECTION_CHARACTERS_PER_TOKEN = 8
"""Section size, about two windows of English: most windows then contain no boundary."""


def calibration_windows(
    settings: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int | None,
    seed: int,
    progress: Progress | None = None,
    given: GivenData | PreTrainedModel | None = None,
    held_out: int = 0,
) -> CalibrationData:
    """Windows of `tokens` tokens, at most `samples`, of the source of `settings` or of what was `given` in its place;
    and `held_out` more, behind those, as far as there are any.

    Documents longer than about two windows are cut at paragraphs; these sections are shuffled by `seed` (so the seed
    samples from the whole text), tokenised once, separated by BOS or EOS, and packed. Windows start with BOS if the
    tokenizer adds one itself. For `source: self` the model is `given`. Rows of token ids of equal length are used as
    windows, in their order; otherwise they are joined and cut like text.

    Raises: CompressError `data.*` if there is not one full window, and everything that `read_texts` raises.
    """
    progress = progress or Silent()
    length, warnings = _length(settings.tokens, max_positions)
    if settings.source == "self":
        model = None if isinstance(given, TokenRows | Texts) else given
        data = _from_model(settings, length, tokenizer, model, seed, progress, warnings, held_out)
    elif isinstance(given, TokenRows):
        data = windows_of_tokens(given, settings, tokenizer, max_positions=max_positions, held_out=held_out)
    else:
        texts = given if isinstance(given, Texts) else None
        data = _from_text(settings, length, tokenizer, seed, warnings, texts, held_out)
    for warning in data.warnings:
        progress.note(f"calibration: {warning}")
    return data


def _length(tokens: int, max_positions: int | None) -> tuple[int, list[str]]:
    if max_positions is None or tokens <= max_positions:
        return tokens, []
    return max_positions, [f"windows shortened from {tokens} to {max_positions} tokens, the model's maximum"]


def _from_text(
    settings: Calibration,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    warnings: list[str],
    given: Texts | None,
    held_out: int,
) -> CalibrationData:
    enough = settings.samples * length * SECTION_CHARACTERS_PER_TOKEN
    texts = given or read_texts(
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
    wanted, further = (count * (length - len(bos)) for count in (settings.samples, held_out))
    packed = pack(parts, tokenizer, bos, min_tokens=settings.min_tokens, wanted=wanted + further)
    all_NT = windows(packed, settings, length, bos, name=texts.name, held_out=held_out)
    windows_NT, held_out_NT = all_NT[: settings.samples], all_NT[settings.samples :]
    skipped = texts.skipped + refused
    if skipped:
        warnings.append(f"{skipped} rows of {texts.name} could not be read and were skipped")
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
        held_out_NT=held_out_NT if len(held_out_NT) else None,
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
    held_out: int,
) -> CalibrationData:
    if model is None:
        raise CompressError(
            "data.self",
            "`source: self` samples text from the model, which needs the whole model in memory",
            where="calibration.source",
            fix="use another source, such as builtin:calibration",
        )

    def sampled(samples: int, seed: int) -> Tensor:
        return self_generated_text(
            model, tokenizer, samples=samples, tokens=length, seed=seed, batch=settings.batch, progress=progress
        )

    windows_NT = sampled(settings.samples, seed)
    return CalibrationData(
        windows_NT,
        "self",
        hashlib.sha256(windows_NT.numpy().tobytes()).hexdigest(),
        documents=len(windows_NT),
        held_out_NT=sampled(held_out, seed + 1) if held_out else None,
        bos=starts_with_bos(tokenizer),
        warnings=tuple(warnings),
    )
