"""Log-likelihoods of continuations: inputs of any length through a runner that takes equally long ones.

B = sequences of a batch, T = tokens of its longest, V = vocabulary, R = scored positions, C = tokens of a continuation,
N = tokens of all continuations of a sequence, M = some of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.evaluation.scores import PIECE_BYTES
from llmcompress.numerics.loss import windows_at_once
from llmcompress.progress import Progress
from llmcompress.runners.base import Runner

PADDING = 0
"""Any token does: a causal model's logits do not see what follows."""


LEAST_LENGTH = 0.8
"""Of the longest sequence of a batch: a CPU gains less from a large batch than it loses by padding."""


@dataclass(frozen=True)
class Continuation:
    """Tokens whose log-likelihood is asked for, after the tokens that come before them."""

    inputs: tuple[int, ...]
    """What the model reads: everything before the last token of the continuation."""
    targets: tuple[int, ...]
    """The continuation; each is predicted at one of the last positions of `inputs`."""


@dataclass(frozen=True)
class Likelihood:
    """The answer."""

    log_likelihood: float
    """Sum over the continuation, natural logarithm."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


@dataclass(frozen=True)
class _Reading:
    """One sequence that is run, and the continuations that are read from its logits."""

    inputs: tuple[int, ...]
    readers: tuple[int, ...]


@torch.inference_mode()
def likelihoods(runner: Runner, asked: Sequence[Continuation], *, progress: Progress, title: str) -> list[Likelihood]:
    """The log-likelihood of every continuation, in the order asked.

    An input that is the beginning of another one is not run: its logits are those of the longer one. Log-softmax is
    taken in float32 at the scored positions only.

    Raises: CompressError `numerics.not-finite` when a log-likelihood is not finite.
    """
    found: list[Likelihood | None] = [None] * len(asked)
    batches = list(_batches(readings([each.inputs for each in asked]), runner.vocabulary))
    progress.stage(title, len(batches))
    done = 0
    for batch in batches:
        logits_BTV = runner.logits(_padded(batch))
        for logits_TV, reading in zip(logits_BTV, batch, strict=True):
            for index, answer in _answers(logits_TV, [(index, asked[index]) for index in reading.readers]):
                found[index] = answer
                if not math.isfinite(answer.log_likelihood):
                    raise _not_finite(runner, asked[index], answer.log_likelihood, title)
        done += sum(len(reading.readers) for reading in batch)
        progress.step(f"{done}/{len(asked)} continuations")
    return [each for each in found if each is not None]


def readings(inputs: Sequence[tuple[int, ...]]) -> list[_Reading]:
    """The sequences to run, longest first: those that are not the beginning of another one.

    In lexicographic order everything that begins with x follows x at once, so x need only be compared with its
    successor, which is the beginning of the successor's reading.
    """
    found: list[tuple[tuple[int, ...], list[int]]] = []
    for index in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        own = inputs[index]
        if found and found[-1][0][: len(own)] == own:
            found[-1][1].append(index)
        else:
            found.append((own, [index]))
    found.sort(key=lambda each: -len(each[0]))
    return [_Reading(tokens, tuple(readers)) for tokens, readers in found]


def _batches(sequences: Sequence[_Reading], vocabulary: int) -> Iterator[list[_Reading]]:
    """Neighbours in length together, as many as may have their logits at once, with little padding."""
    start = 0
    while start < len(sequences):
        longest = len(sequences[start].inputs)
        end = start + 1
        most = start + windows_at_once(longest, vocabulary)
        while end < min(most, len(sequences)) and len(sequences[end].inputs) >= LEAST_LENGTH * longest:
            end += 1
        yield list(sequences[start:end])
        start = end


def _padded(batch: Sequence[_Reading]) -> Tensor:
    """B×T, padded on the right."""
    longest = max(len(reading.inputs) for reading in batch)
    rows = [list(reading.inputs) + [PADDING] * (longest - len(reading.inputs)) for reading in batch]
    return torch.tensor(rows, dtype=torch.long)


def _answers(logits_TV: Tensor, asked: Sequence[tuple[int, Continuation]]) -> Iterator[tuple[int, Likelihood]]:
    """Of all continuations that are read from one sequence. A position that several ask for is normalised once."""
    device = logits_TV.device
    places_N = torch.tensor([place for _, each in asked for place in _places(each)], device=device)
    targets_N = torch.tensor([token for _, each in asked for token in each.targets], device=device)
    scored_R, row_N = torch.unique(places_N, return_inverse=True)
    logprob_N, greedy_N = torch.empty(len(row_N), device=device), torch.empty_like(row_N, dtype=torch.bool)
    rows = max(1, PIECE_BYTES // (4 * logits_TV.shape[-1]))
    for start in range(0, len(scored_R), rows):
        logprobs_RV = torch.log_softmax(logits_TV[scored_R[start : start + rows]].float(), -1)
        here_N = (row_N >= start) & (row_N < start + rows)
        row_M, targets_M = row_N[here_N] - start, targets_N[here_N]
        logprob_N[here_N] = logprobs_RV[row_M, targets_M]
        greedy_N[here_N] = logprobs_RV.argmax(-1)[row_M] == targets_M
    lengths = [len(each.targets) for _, each in asked]
    parts = zip(asked, torch.split(logprob_N.cpu(), lengths), torch.split(greedy_N.cpu(), lengths), strict=True)
    for (index, _), logprob_C, greedy_C in parts:
        yield index, Likelihood(float(logprob_C.sum()), bool(greedy_C.all()))


def _places(each: Continuation) -> range:
    """Where its tokens are predicted."""
    return range(len(each.inputs) - len(each.targets), len(each.inputs))


def _not_finite(runner: Runner, each: Continuation, value: float, title: str) -> CompressError:
    part = runner.first_not_finite(torch.tensor([each.inputs]))
    found = f"; the first part of the model to compute NaN or Inf is {part}" if part else ""
    return CompressError(
        "numerics.not-finite",
        f"the log-likelihood of an answer is {value}{found}",
        where=title,
        fix="use float32 or bfloat16 (float16 overflows at 65504); if it persists, a weight is damaged: measure the "
        "dense model alone with `llmcompress evaluate`",
    )
