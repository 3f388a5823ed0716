"""Documents packed into full token windows, at once or in a stream. N = windows, T = tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.packing import pack
from llmcompress.errors import CompressError
from llmcompress.training.data.base import Windows
from llmcompress.training.data.batch import Batch, Sample, padded
from llmcompress.training.data.encoders import Text
from llmcompress.training.data.rows import Numbered, Stream

_TOGETHER = 64
"""Documents of a stream that are tokenised at once."""


def packed_windows(rows: Any, encoder: Text, tokens: int) -> Windows:
    """All windows that the documents fill.

    Raises: CompressError when there is not one.
    """
    found = list(_windows(enumerate(rows), encoder, tokens))
    if not found:
        raise CompressError(
            "data.too-little",
            f"the text does not fill one window of {tokens} tokens",
            fix="use more text, or fewer `tokens`",
        )
    return Windows(torch.stack(found))


class PackedStream(Stream):
    """Windows as the documents come. A resumed training tokenises again what lies before its step."""

    predicts_all = True

    def __init__(self, rows: Any, encoder: Text, tokens: int, *, shuffle: int) -> None:
        super().__init__(rows, encoder, shuffle=shuffle)
        self._text, self.longest = encoder, tokens

    @override
    def items(self, seed: int) -> Iterator[Tensor]:
        assert self.longest is not None
        return _windows(self.rows(seed), self._text, self.longest)

    @override
    def batch(self, items: Sequence[Any]) -> Batch:
        return padded([Sample(window_T) for window_T in items])


def _windows(rows: Iterator[Numbered], encoder: Text, tokens: int) -> Iterator[Tensor]:
    """Begun with the BOS where the tokenizer does so itself; documents are separated as in calibration."""
    content, left = tokens - len(encoder.bos), list[int]()
    while some := list(islice(rows, _TOGETHER)):
        documents = [encoder.document(number, row) for number, row in some]
        left += pack(documents, encoder.tokenizer, encoder.bos, min_tokens=1, wanted=2**62).tokens
        while len(left) >= content:
            yield torch.tensor(encoder.bos + left[:content])
            left = left[content:]
