"""llama-perplexity's KL base file: tokens, and a dense model's log-probabilities in 16 bits, written and read back.

`llama-perplexity --kl-divergence-base FILE` writes and reads the same form, so either side can be the other's dense
model. C = chunks, W = tokens of a chunk, R = scored positions of a chunk (its second half), V = vocabulary.

Source: github.com/ggml-org/llama.cpp tools/perplexity/perplexity.cpp (`log_softmax`, `perplexity`, `kl_divergence`).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.runners.base import Runner

MAGIC = b"_logits_"
_HEADER = struct.Struct("<8siii")
"""Magic, tokens of a chunk, vocabulary, chunks; then all tokens as int32, then rows of `_HEAD` and 16-bit codes."""
_HEAD = 4
"""16-bit words before the codes of a row: its scale and its lowest log-probability, both float32."""
LEAST = 16.0
"""Logits further below the largest one are stored as if they were this far."""
LEVELS = 65535
LEAST_LEFT = 2.0**-23
"""Probability that the lowest tokens have together, at least: the rounding of float32."""


class KlBase(Runner):
    """Gives back the logits in the file as if a model computed them, for the file's chunks alone.

    They are log-probabilities to within half a step of 16 / 65535 nats. The first half of a chunk has none: NaN there.
    """

    name = "kl-base"
    max_positions = None
    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        """Raises: CompressError for a file that is none, or is cut off."""
        self.path = path
        self.chunk, self.vocabulary, self.chunks = _header(path)
        tokens, before = self.chunks * self.chunk, _HEADER.size // 4
        whole = torch.from_file(str(path), shared=False, size=before + tokens, dtype=torch.int32)
        self.tokens_CW = whole[before:].view(self.chunks, self.chunk)
        before = 2 * (before + tokens)
        words = self.chunks * scored_rows(self.chunk) * row_words(self.vocabulary)
        rows = torch.from_file(str(path), shared=False, size=before + words, dtype=torch.int16)
        self._rows_CRV = rows[before:].view(self.chunks, scored_rows(self.chunk), -1)
        # the first token may be a BOS in one model's windows and the text's own in the file
        self._chunk_of = {tuple(tokens[1:-1]): index for index, tokens in enumerate(self.tokens_CW.tolist())}

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(Path(model))

    @override
    def logits(self, ids_BT: Tensor) -> Tensor:
        found_BTV = torch.full((*ids_BT.shape, self.vocabulary), torch.nan)
        for number, tokens in enumerate(ids_BT.tolist()):
            rows_RV = self._rows_CRV[self._chunk_of[tuple(tokens[1 : self.chunk - 1])]]
            found_BTV[number, self.chunk // 2 : self.chunk - 1] = decoded_rows(rows_RV, self.vocabulary)
        return found_BTV

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Raises: CompressError: a file computes nothing."""
        raise self._no_model()

    @override
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        """Raises: CompressError: a file computes nothing."""
        raise self._no_model()

    def _no_model(self) -> CompressError:
        return CompressError(
            "evaluate.kl-base",
            f"{self.path.name} holds the scores of one text, and no model that could generate text",
            fix="give the dense model itself",
            exit_code=ExitCode.USAGE,
        )

    @override
    def close(self) -> None:
        """Nothing was taken."""


def write_kl_base(path: Path, windows_CW: Tensor, logits: Iterable[Tensor], vocabulary: int) -> None:
    """Chunks of tokens, and the logits of their scored positions in pieces ?×V, in the order of the chunks."""
    chunks, chunk = windows_CW.shape
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, chunk, vocabulary, chunks))
        file.write(windows_CW.to(torch.int32).contiguous().numpy().tobytes())
        for logits_RV in logits:
            file.write(encoded_rows(logits_RV).numpy().tobytes())


def scored_rows(chunk: int) -> int:
    """Positions of a chunk whose predictions are stored: those from more than half of it."""
    return chunk - 1 - chunk // 2


def row_words(vocabulary: int) -> int:
    """16-bit words of a row."""
    return 2 * ((vocabulary + 1) // 2) + _HEAD


def encoded_rows(logits_RV: Tensor) -> Tensor:
    """Rows as 16-bit words: codes in equal steps from the lowest logit, at most 16 below the largest, to that one."""
    logits_RV = logits_RV.float().cpu()
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    lowest_R1 = logits_RV.amin(-1, keepdim=True).maximum(largest_R1 - LEAST)
    sum_R1 = torch.logsumexp(logits_RV.double(), -1, keepdim=True).float() - largest_R1
    scale_R1 = (largest_R1 - lowest_R1) / LEVELS
    inverse_R1 = torch.where(scale_R1 > 0, 1 / scale_R1, 0.0)
    codes_RV = ((logits_RV - lowest_R1).clamp(min=0) * inverse_R1).round()
    words = torch.zeros(len(logits_RV), row_words(logits_RV.shape[1]), dtype=torch.int16)
    words[:, :_HEAD] = torch.cat([scale_R1, lowest_R1 - largest_R1 - sum_R1], -1).view(torch.int16)
    words[:, _HEAD : _HEAD + logits_RV.shape[1]] = codes_RV.int().to(torch.int16)
    return words


def decoded_rows(words: Tensor, vocabulary: int) -> Tensor:
    """R×V log-probabilities.

    Code 0 stands for the lowest logit and everything below it: those tokens share evenly what the others leave over, so
    that a row sums to 1.
    """
    head_R2 = words[:, :_HEAD].contiguous().view(torch.float32)
    codes_RV = words[:, _HEAD : _HEAD + vocabulary].int() & 0xFFFF
    logprobs_RV = codes_RV.float() * head_R2[:, :1] + head_R2[:, 1:]
    lowest_RV = codes_RV == 0
    seen_R1 = logprobs_RV.exp().masked_fill(lowest_RV, 0).sum(-1, keepdim=True)
    share_R1 = (1 - seen_R1).clamp(min=LEAST_LEFT) / lowest_RV.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(lowest_RV, share_R1.log().minimum(head_R2[:, 1:]), logprobs_RV)


def _header(path: Path) -> tuple[int, int, int]:
    """Tokens of a chunk, vocabulary, chunks."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise _damaged(path, "it does not begin as one")
    _, chunk, vocabulary, chunks = _HEADER.unpack(head)
    if min(chunk - 3, vocabulary, chunks) < 1:
        raise _damaged(path, f"it claims {chunks} chunks of {chunk} tokens and {vocabulary} logits")
    wanted = _HEADER.size + 4 * chunks * chunk + 2 * chunks * scored_rows(chunk) * row_words(vocabulary)
    size = path.stat().st_size
    if size < wanted:
        raise _damaged(path, f"it has {size:,} of {wanted:,} bytes")
    return chunk, vocabulary, chunks


def _damaged(path: Path, reason: str) -> CompressError:
    return CompressError(
        "evaluate.kl-base",
        f"{path.name} is not a complete KL base file of llama-perplexity: {reason}",
        fix="write it again, with llama-perplexity or `llmcompress.model_evaluation.write_kl_base`",
    )
