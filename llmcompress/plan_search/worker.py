"""A worker: claims trials that wait, one after the other, judges them, and tells the study what it found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llmcompress.plan_search.judging import Judge, judged
from llmcompress.plan_search.problem import Outcome
from llmcompress.plan_search.study_folder import Worker
from llmcompress.plan_search.trials import Claimed, Trials
from llmcompress.progress import Progress, Silent

OVER = "over"
"""What a study remembers once its search has ended."""

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Where one process judges plans of one study."""

    trials: Trials
    judge: Judge
    worker: Worker
    known: dict[str, Outcome] = field(default_factory=dict)
    """Key → outcome that this process, or a dead one in its folder, found before; grows."""
    progress: Progress = field(default_factory=Silent)

    def work_once(self) -> Outcome | None:
        """Claim and judge one trial, or answer it from what is known; None: no trial waits."""
        claimed = self.trials.claim(self.worker.name)
        if claimed is None:
            return None
        outcome = self.known.get(claimed.key) or self._judged(claimed)
        self.trials.finish(claimed, outcome)
        return outcome

    def _judged(self, claimed: Claimed) -> Outcome:
        with self.trials.alive(claimed):
            found = judged(self.judge, claimed.proposal)
        outcome = replace(found, costs={**claimed.costs, **found.costs})
        self.worker.keep(claimed.key, outcome)  # before the database is told, which may be down
        self.known[claimed.key] = outcome
        return outcome


def work(desk: Desk, *, is_wanted: Callable[[], bool], sleep: Callable[[float], None] = time.sleep) -> int:
    """Work until the search is over, or as long as it is wanted; how many trials it finished."""
    done = 0
    while is_wanted():
        if desk.work_once() is not None:
            done += 1
            desk.progress.step(f"trial {done}")
        elif desk.trials.about(OVER):
            break
        else:
            sleep(POLL_SECONDS)
    return done
