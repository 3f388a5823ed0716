"""The judge of a real search: plans put together on a bench of levels, compared with the dense model. N = windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.errors import is_out_of_memory
from llmcompress.search.levels.bench import Bench
from llmcompress.search.levels.judged import JudgedText
from llmcompress.search.plan_space import Plan
from llmcompress.search.problem import Outcome
from llmcompress.search.settings import hashed


class BenchJudge:
    """Mean KL divergence per token on the first windows of a text."""

    def __init__(self, bench: Bench, windows_NT: Tensor, levels: str) -> None:
        """`levels`: the fingerprint of what the bench holds."""
        self._bench, self._windows_NT = bench, windows_NT
        text = hashlib.sha256(windows_NT.contiguous().numpy().tobytes()).hexdigest()
        self.fingerprint = hashed([levels, text])

    def __call__(self, plan: Plan, tokens: int) -> Outcome:
        """On so many tokens."""
        return Outcome(plan, tokens, float(self.windows(plan, tokens).mean()))

    def windows(self, plan: Plan, tokens: int) -> Tensor:
        """Mean divergence per token of every window, N."""
        try:
            return self._bench.divergences(plan, self.text(tokens))
        except Exception as problem:
            if is_out_of_memory(problem) and torch.cuda.is_available():
                torch.cuda.empty_cache()  # the next plan may fit
            raise

    def text(self, tokens: int) -> JudgedText:
        """The first windows, so many tokens together."""
        return self._bench.text(self._windows_NT[: tokens // self._windows_NT.shape[1]])


def whole_windows(stages: Sequence[int], windows_NT: Tensor) -> tuple[int, ...]:
    """Stages as whole windows, no more than there are, each once."""
    count, length = windows_NT.shape
    return tuple(sorted({min(count, max(1, stage // length)) * length for stage in stages}))
