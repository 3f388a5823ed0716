"""Token scores: the one loop over a text from which all quality metrics are computed.

B = windows in a batch, W = tokens of a window, P = predictions of a window that count, R = some of those, V =
vocabulary, K = top tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.numerics.likely import best_tokens, top_tokens
from llmcompress.numerics.loss import windows_at_once
from llmcompress.runners.base import Runner

PIECE_BYTES = 2**21
"""Float32 logits processed at a time: they are read several times, and should stay in a processor's cache."""


@dataclass(frozen=True)
class Piece:
    """Some neighbouring positions of one window, and the whole distribution at each."""

    window: int
    start: int
    """The first position, counted in predictions that count."""
    targets_R: Tensor
    logprobs_RV: Tensor
    """Float32, on the runner's device."""


@dataclass(frozen=True)
class WindowScores:
    """The scores of one window, on the CPU. Log-probabilities are natural logarithms in float32."""

    window: int
    targets_P: Tensor
    """The actual tokens, int32."""
    logprob_P: Tensor
    """Log-probabilities of the actual tokens."""
    best_P: Tensor
    """The most likely tokens, int32."""
    best_logprob_P: Tensor
    """Theirs."""
    ids_PK: Tensor
    """Additional scored tokens, int32."""
    logprobs_PK: Tensor
    """Theirs."""


@torch.inference_mode()
def score(
    runner: Runner,
    windows: Sequence[Tensor],
    *,
    skipped: Sequence[int] = (),
    batch: int | None = None,
    top: int = 0,
    reference: Sequence[WindowScores] | None = None,
    name: str = "the text",
) -> Iterator[WindowScores]:
    """Every window's scores, in order; what is computed of the next one is computed when it is asked for.

    Besides the actual token, the `top` most likely ones are scored, or those that a `reference` scored in the
    same window. `skipped`: predictions at the beginning of every window that are context alone (empty: none). `batch`:
    windows that go through the model together (None: by the size of their logits); changes no result. `name` is what
    errors call the text.

    Raises: CompressError `numerics.not-finite` naming the window, when a log-probability is not finite.
    """
    skips = skipped or (0,) * len(windows)
    pieces = log_probabilities(runner, windows, skips, batch=batch)
    for index, its in groupby(pieces, key=lambda piece: piece.window):
        parts = [_looked_at(piece, top, reference) for piece in its]
        logprob_P, best_P, best_logprob_P, ids_PK, logprobs_PK = (
            torch.cat(part).cpu() for part in zip(*parts, strict=True)
        )
        if not logprob_P.isfinite().all():
            where = f"window {index + 1} of {name}"
            raise _not_finite(runner, windows[index], logprob_P, skips[index], where)
        targets_P = windows[index][1 + skips[index] :].to("cpu", torch.int32)
        yield WindowScores(index, targets_P, logprob_P, best_P.int(), best_logprob_P, ids_PK.int(), logprobs_PK)


@torch.inference_mode()
def log_probabilities(
    runner: Runner, windows: Sequence[Tensor], skipped: Sequence[int], *, batch: int | None = None
) -> Iterator[Piece]:
    """The distributions of all predictions that count, window after window, in pieces of `PIECE_BYTES`.

    The last token of a window is not run: nothing is predicted from it. Float32 copies of a whole batch's logits never
    exist, only of one piece's.
    """
    rows = max(1, PIECE_BYTES // (4 * runner.vocabulary))
    for first, windows_BW in _batches(windows, batch, runner.vocabulary):
        logits_BWV = runner.logits(windows_BW[:, :-1])
        targets_BW = windows_BW[:, 1:].to(logits_BWV.device)
        for index, (logits_WV, targets_W) in enumerate(zip(logits_BWV, targets_BW, strict=True), start=first):
            start, skip = 0, skipped[index]
            for logits_RV, targets_R in zip(logits_WV[skip:].split(rows), targets_W[skip:].split(rows), strict=True):
                yield Piece(index, start, targets_R, torch.log_softmax(logits_RV.float(), -1))
                start += len(targets_R)


def _looked_at(piece: Piece, top: int, reference: Sequence[WindowScores] | None) -> tuple[Tensor, ...]:
    """Log-probabilities of the targets, the most likely tokens with theirs, tokens looked at with theirs."""
    logprobs_RV, count = piece.logprobs_RV, len(piece.targets_R)
    best_logprob_R, best_R = best_tokens(logprobs_RV)
    if reference is not None:
        ids_RK = reference[piece.window].ids_PK[piece.start : piece.start + count].to(logprobs_RV.device).long()
    elif top:
        ids_RK = top_tokens(logprobs_RV, top)[1]
    else:
        ids_RK = piece.targets_R.new_zeros(count, 0)
    target_R = logprobs_RV.gather(-1, piece.targets_R[:, None])[:, 0]
    return target_R, best_R, best_logprob_R, ids_RK, logprobs_RV.gather(-1, ids_RK)


def _batches(windows: Sequence[Tensor], batch: int | None, vocabulary: int) -> Iterator[tuple[int, Tensor]]:
    """Equally long neighbours together, so nothing is ever padded; with the index of the first one."""
    first = 0
    for length, group in groupby(windows, key=len):
        same = list(group)
        size = batch or windows_at_once(length, vocabulary)
        for start in range(0, len(same), size):
            yield first + start, torch.stack(same[start : start + size])
        first += len(same)


def _not_finite(runner: Runner, window_W: Tensor, logprob_P: Tensor, skipped: int, where: str) -> CompressError:
    """Names the part of the model that overflows, if the runtime can tell."""
    place = int((~logprob_P.isfinite()).nonzero()[0])
    part = runner.first_not_finite(window_W[None, :-1])
    found = f"; the first part of the model to compute NaN or Inf is {part}" if part else ""
    return CompressError(
        "numerics.not-finite",
        f"the log-probability of a token is {float(logprob_P[place])}{found}",
        where=f"{where}, token {place + skipped + 1}",
        fix="use float32 or bfloat16 (float16 overflows at 65504); if it persists, a weight is damaged: measure the "
        "dense model alone with `llmcompress evaluate`",
    )
