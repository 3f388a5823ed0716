"""Who says how good a plan is: `Judge`, the one on a bench of levels, and the key of what is known already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Proposal
from llmcompress.plan_search.settings import hashed


class Judge(Protocol):
    """Says how good plans are."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything that an outcome depends on beside the plan and the number of tokens."""

    def __call__(self, plan: Plan, tokens: int) -> Outcome:
        """What is found of a plan on so many tokens."""


def key_of(judge: str, proposal: Proposal) -> str:
    """The same for equal plans judged on equal text by equal levels, in any study; `judge`: its fingerprint."""
    return hashed([judge, list(proposal.plan), proposal.tokens])


def judged(judge: Judge, proposal: Proposal) -> Outcome:
    """The outcome; where memory runs out, a number is not finite or a plan cannot be made, one that is not valid.

    Everything else is a bug, and is raised.
    """
    try:
        found = judge(proposal.plan, proposal.tokens)
    except CompressError as refused:
        return failed(proposal, f"{refused.what} [{refused.code}]")
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        return failed(proposal, "out of memory")
    if not math.isfinite(found.loss):
        return failed(proposal, "the loss is not a finite number", found.costs)
    return found


def failed(proposal: Proposal, problem: str, costs: Mapping[str, float] | None = None) -> Outcome:
    """The outcome of a plan that could not be judged."""
    return Outcome(proposal.plan, proposal.tokens, math.inf, costs or {}, problem)


class FunctionJudge:
    """A function as a judge: a table of all plans, or a test."""

    def __init__(self, function: Callable[[Plan, int], Outcome], fingerprint: str) -> None:
        self._function, self.fingerprint = function, fingerprint

    def __call__(self, plan: Plan, tokens: int) -> Outcome:
        """What the function says."""
        return self._function(plan, tokens)
