"""Text → full windows of tokens: cut into sections, tokenise as far as needed, join, cut. N = windows, T = tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.tokens import token_lists, unknown_warning
from llmcompress.errors import CompressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODED_TOGETHER = 64


def sections(document: str, characters: int) -> Iterator[str]:
    """Cut a long document at blank lines, else at line ends, else anywhere, into parts of about that size."""
    start = 0
    while len(document) - start > 2 * characters:
        for seam in ("\n\n", "\n", " "):
            cut = document.find(seam, start + characters, start + 2 * characters)
            if cut >= 0:
                yield document[start:cut]
                start = cut + len(seam)
                break
        else:
            yield document[start : start + characters]
            start += characters
    yield document[start:]


@dataclass
class Packed:
    """Sections tokenised so far."""

    tokens: list[int] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    short: list[int] = field(default_factory=list)
    """Lengths of the skipped sections."""
    unknown: str | None = None

    def add(self, tokens: list[int], bos: list[int], separator: list[int], *, min_tokens: int, text: str) -> None:
        """One more section, unless it is too short."""
        if tokens[: len(bos)] == bos:  # a chat template writes its own BOS; the windows get theirs anyway
            tokens = tokens[len(bos) :]
        if len(tokens) < min_tokens:
            self.short.append(len(tokens))
            return
        self.used.append(text)
        self.tokens.extend(tokens)
        if tokens[-1:] != separator:  # a chat template may end with it
            self.tokens.extend(separator)


def pack(
    parts: Sequence[str], tokenizer: PreTrainedTokenizerBase, bos: list[int], *, min_tokens: int, wanted: int
) -> Packed:
    """Tokenise in order, only as far as needed, with a separator after every section.

    That is the BOS where the tokenizer begins a text with it (`bos`), else the EOS, else nothing: an EOS that the
    model never saw in training costs stories260K half a bit per token, a BOS nothing.
    """
    packed = Packed()
    separator = separator_of(tokenizer, bos)
    lists: list[list[int]] = []
    seen = 0
    for chunk in _chunks(parts):
        chunk_lists = token_lists(tokenizer, chunk)
        lists.extend(chunk_lists)
        seen += len(chunk)
        for section, tokens in zip(chunk, chunk_lists, strict=True):
            packed.add(tokens, bos, separator, min_tokens=min_tokens, text=section)
            if len(packed.tokens) >= wanted:
                packed.unknown = unknown_warning(tokenizer, parts[:seen], lists)
                return packed
    packed.unknown = unknown_warning(tokenizer, parts, lists)
    return packed


def separator_of(tokenizer: PreTrainedTokenizerBase, bos: list[int]) -> list[int]:
    """What stands behind every section."""
    return bos or [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)


def _chunks(parts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(parts), _ENCODED_TOGETHER):
        yield parts[start : start + _ENCODED_TOGETHER]


def windows(
    packed: Packed, settings: Calibration, length: int, bos: list[int], *, name: str, held_out: int = 0
) -> Tensor:
    """The first full windows, at most `samples` and `held_out` more.

    Raises: CompressError when there is not one.
    """
    if not packed.used:
        raise CompressError(
            "data.too-short",
            f"{name}: no usable samples: all {len(packed.short)} have fewer than {settings.min_tokens} tokens "
            f"({_histogram(packed.short)})",
            where="calibration.min_tokens",
            fix=f"lower `min_tokens` to {max(packed.short)} or less, or use another source"
            if max(packed.short)
            else "use another source",
        )
    content = length - len(bos)
    count = min(len(packed.tokens) // content, settings.samples + held_out) if content else 0
    if not count:
        raise CompressError(
            "data.too-little",
            f"{name}: {len(packed.tokens)} tokens in {len(packed.used)} samples do not fill one window of {length}",
            where="calibration.tokens",
            fix=f"set `tokens` to {len(packed.tokens) + len(bos)} or less, or use more text",
        )
    content_NT = torch.tensor(packed.tokens[: count * content]).view(count, content)
    bos_N1 = torch.tensor(bos, dtype=torch.long).expand(count, -1)
    return torch.cat([bos_N1, content_NT], dim=1)


def _histogram(lengths: Iterable[int]) -> str:
    """`0 tokens: 3 samples, 1: 2, 2-3: 5, 4-7: 9`."""
    counts: dict[int, int] = {}
    for length in sorted(lengths):
        counts[length.bit_length()] = counts.get(length.bit_length(), 0) + 1
    spans = {bits: (2 ** (bits - 1), 2**bits - 1) if bits else (0, 0) for bits in counts}
    names = [str(low) if low == high else f"{low}-{high}" for low, high in spans.values()]
    return ", ".join(
        f"{name} tokens: {count} samples" if first else f"{name}: {count}"
        for first, name, count in zip([True] + [False] * len(names), names, counts.values(), strict=False)
    )
