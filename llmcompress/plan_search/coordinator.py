"""The coordinator: runs the optimizer, enqueues what it proposes, and tells it the outcomes; started again it goes on.

An optimizer is a pure function of the problem, the seed and the outcomes, so going on means running it again from the
beginning and answering from what was recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmcompress.plan_search.judging import key_of
from llmcompress.plan_search.optimizers.base import AskTell
from llmcompress.plan_search.problem import Outcome, Problem, Proposal
from llmcompress.plan_search.trials import Trials
from llmcompress.plan_search.worker import OVER, POLL_SECONDS, Desk
from llmcompress.progress import Progress, Silent


def no_worker() -> Sequence[str]:
    """No worker has died."""
    return ()


@dataclass(kw_only=True)
class Coordinator:
    """One search."""

    problem: Problem
    trials: Trials
    judge_fingerprint: str
    desk: Desk | None
    """Where this process judges plans itself; None: workers do."""
    dead_workers: Callable[[], Sequence[str]] = no_worker
    """Names of workers whose processes ended; asked whenever there is nothing to do. Others may join or be started."""
    progress: Progress = field(default_factory=Silent)
    sleep: Callable[[float], None] = time.sleep
    known: dict[str, Outcome] = field(default_factory=dict)
    """Key → outcome; grows."""

    def run(self, search: AskTell, trials: int) -> list[Outcome]:
        """All outcomes in the order in which they were asked for; a plan that was asked for twice is there twice."""
        found: list[Outcome] = []
        self.trials.retry_dead(self.dead_workers())
        self._read()
        self.progress.stage("search", trials)
        while asked := search.ask():
            outcomes = self.answers(asked)
            search.tell(outcomes)
            found += outcomes
        return found

    def end(self) -> None:
        """Nothing more will be asked: workers may leave."""
        self.trials.remember(OVER, True)

    def answers(self, asked: Sequence[Proposal]) -> list[Outcome]:
        """The outcomes of these proposals, in their order, from what is known or as soon as they were judged."""
        keys = [key_of(self.judge_fingerprint, each) for each in asked]
        wanted = dict(zip(keys, asked, strict=True))
        told: set[str] = set()
        while missing := [key for key in wanted if key not in self.known]:
            self._enqueue({key: wanted[key] for key in missing})
            if self.desk is None or self.desk.work_once() is None:
                self.trials.retry_dead(self.dead_workers())
                self.sleep(POLL_SECONDS)
            self._read()
            self._tell(wanted, told)
        self._tell(wanted, told)
        return [self.known[key] for key in keys]

    def _enqueue(self, missing: dict[str, Proposal]) -> None:
        unfinished = self.trials.unfinished()
        self._read()  # after the others were listed: one that ends in between is in one of the two
        for key, proposal in missing.items():
            if key not in unfinished and key not in self.known:
                self.trials.enqueue(self.problem, proposal, key)

    def _read(self) -> None:
        for each in self.trials.finished():
            self.known.setdefault(each.key, each.outcome)

    def _tell(self, wanted: dict[str, Proposal], told: set[str]) -> None:
        for key in wanted:
            if key in self.known and key not in told:
                told.add(key)
                outcome = self.known[key]
                said = f"loss {outcome.loss:.4f}" if outcome.is_valid else str(outcome.problem)
                self.progress.step(f"{outcome.tokens} tokens: {said}")
