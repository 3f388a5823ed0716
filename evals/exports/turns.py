"""Tokens per second of exported files in their runtimes, in turns in which everything runs once.

Processor time of one thread: other programs on the machine hardly count, and turns are compared with each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.torch_runner import TorchRunner

DENSE = "transformers float32, dense"
PROMPT, NEW, TURNS = 128, 64, 7
PROTOCOL = {"prompt": PROMPT, "new": NEW, "turns": TURNS, "threads": 1, "clock": "processor"}
CPU = torch.device("cpu")

Taken = tuple[float, float]
"""Tokens per second of a prefill and of decoding."""


@dataclass(frozen=True)
class Candidate:
    """Files, and who runs them."""

    name: str
    path: Path
    runner: str
    beside: str | None = None
    """The name of what the runtime's own tool makes in the same shape and groups."""


def opened(candidate: Candidate) -> Runner:
    """Its runner."""
    return RUNNERS[candidate.runner].open(str(candidate.path), device=CPU, dtype=torch.float32)


def speeds(
    candidates: Sequence[Candidate], original: PreTrainedModel, *, turns: int = TURNS
) -> dict[str, dict[str, object]]:
    """Medians over turns; what is measured first and last changes from turn to turn."""
    prompt_BT = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[Taken]] = {DENSE: [], **{each.name: [] for each in candidates}}
    for turn in range(turns):
        with TorchRunner(original) as runner:
            taken[DENSE].append(_timed(runner, prompt_BT))
        for each in candidates if turn % 2 else reversed(candidates):
            with opened(each) as runner:
                taken[each.name].append(_timed(runner, prompt_BT))
    found = {name: _medians(pairs, taken[DENSE]) for name, pairs in taken.items()}
    for each in candidates:
        if each.beside in taken:
            found[each.name] |= _beside(taken, each.name, each.beside)
    return found


def _medians(pairs: Sequence[Taken], dense: Sequence[Taken]) -> dict[str, object]:
    ratios = [ours[1] / theirs[1] for ours, theirs in zip(pairs, dense, strict=True)]
    return {
        "prefill": statistics.median(prefill for prefill, _ in pairs),
        "decode": statistics.median(decode for _, decode in pairs),
        "decode_to_transformers": statistics.median(ratios),
    }


def _beside(taken: Mapping[str, Sequence[Taken]], ours: str, theirs: str) -> dict[str, object]:
    """Decode ÷ that of the runtime's own in the same turn: the median, and half of what lies between the quartiles."""
    ratios = [a[1] / b[1] for a, b in zip(taken[ours], taken[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"decode_to_own": middle, "decode_to_own_spread": (high - low) / 2}


def _timed(runner: Runner, prompt_BT: Tensor) -> Taken:
    """Of one runner that is warm."""
    list(runner.stream(prompt_BT, max_new_tokens=2))
    begun = time.process_time()
    steps = runner.stream(prompt_BT, max_new_tokens=NEW)
    next(steps)
    first = time.process_time()
    list(steps)
    return PROMPT / (first - begun), (NEW - 1) / (time.process_time() - first)
