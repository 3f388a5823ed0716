"""The judge of a real search: plans put together on a bench of levels, compared with the dense model. N = windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import is_out_of_memory
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.judged import JudgedText
from llmcompress.plan_search.opening import Subject
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome
from llmcompress.plan_search.proxies.base import TextJudge
from llmcompress.plan_search.proxies.supernet.elastic import SupernetJudge, trained_supernet
from llmcompress.plan_search.settings import hashed


class BenchJudge:
    """Mean KL divergence per token on the first windows of a text."""

    def __init__(self, bench: Bench, by: TextJudge[JudgedText], windows_NT: Tensor, fingerprint: str) -> None:
        self._bench, self._by, self._windows_NT = bench, by, windows_NT
        self.fingerprint = fingerprint

    def __call__(self, plan: Plan, tokens: int) -> Outcome:
        """On so many tokens."""
        return Outcome(plan, tokens, float(self.windows(plan, tokens).mean()))

    def windows(self, plan: Plan, tokens: int) -> Tensor:
        """Mean divergence per token of every window, N."""
        try:
            return self._by.divergences(plan, self.text(tokens)).double()
        except Exception as problem:
            if is_out_of_memory(problem) and torch.cuda.is_available():
                torch.cuda.empty_cache()  # the next plan may fit
            raise

    def text(self, tokens: int) -> JudgedText:
        """The first windows, so many tokens together."""
        return self._bench.text(self._windows_NT[: tokens // self._windows_NT.shape[1]])


def supernet_of(subject: Subject) -> WholeModel | None:
    """The supernet that the settings ask for, trained; before the bench, which needs the device too."""
    settings = subject.settings.judge.supernet
    return None if settings is None else trained_supernet(subject.whole, subject.space, settings)


def bench_judge(bench: Bench, subject: Subject, levels: str, supernet: WholeModel | None) -> BenchJudge:
    """As the settings say; `levels`: the fingerprint of what the bench holds."""
    settings, windows_NT = subject.settings.judge, subject.judged_NT
    by: TextJudge[JudgedText] = settings.judge(bench, windows_NT, subject.whole, subject.space)
    if supernet is not None:
        by = SupernetJudge(bench, windows_NT, supernet, subject.space)
    text = hashlib.sha256(windows_NT.contiguous().numpy().tobytes()).hexdigest()
    options = settings.model_dump(mode="json", exclude={"text", "stages"})
    return BenchJudge(bench, by, windows_NT, hashed([levels, text, options]))


def whole_windows(stages: Sequence[int], windows_NT: Tensor) -> tuple[int, ...]:
    """Stages as whole windows, no more than there are, each once."""
    count, length = windows_NT.shape
    return tuple(sorted({min(count, max(1, stage // length)) * length for stage in stages}))
