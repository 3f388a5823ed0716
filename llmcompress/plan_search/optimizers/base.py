"""The base class of optimizers: frozen options, and a generator of proposals that is told outcomes.

A generator reads like the paper's loop. It must be a pure function of the problem, the seed and what it is told: a
search that was killed runs it again, and answers from what was recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmcompress.plan_search.problem import Outcome, Problem, Proposal
from llmcompress.registry import Registry

Proposals = Generator[Sequence[Proposal], Sequence[Outcome], None]
"""Yields plans that may be judged at the same time; is sent their outcomes, in the same order."""


class Optimizer(BaseModel, ABC):
    """One algorithm; the fields are exactly the options that a search file may set."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    only_one: ClassVar[bool] = True
    """In a search file its options stand under its name, without a list."""

    trials: int = Field(default=200, ge=1)
    """It ends when so many plans were judged; a plan judged on more tokens counts again."""

    @abstractmethod
    def proposals(self, problem: Problem, random: np.random.Generator) -> Proposals:
        """What to judge next, until there is nothing left to try; the driver may end it earlier."""


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", "llmcompress.plan_search.optimizers")


class AskTell:
    """An optimizer behind ask and tell."""

    def __init__(self, optimizer: Optimizer, problem: Problem, *, seed: int = 0) -> None:
        self._steps = optimizer.proposals(problem, np.random.default_rng(seed))
        self._asked: Sequence[Proposal] | None = None
        self._told: Sequence[Outcome] | None = None
        self._left = optimizer.trials

    def ask(self) -> Sequence[Proposal]:
        """The next plans, which may be judged at the same time; none: the search is over."""
        assert self._asked is None, "tell the outcomes of the last proposals first"
        if self._left <= 0:
            return ()
        try:
            asked = next(self._steps) if self._told is None else self._steps.send(self._told)
        except StopIteration:
            return ()
        self._asked = tuple(asked)[: self._left]
        self._left -= len(self._asked)
        return self._asked

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """The outcomes of the last proposals, in the same order."""
        assert self._asked is not None and [each.plan for each in outcomes] == [each.plan for each in self._asked]
        self._asked, self._told = None, tuple(outcomes)
