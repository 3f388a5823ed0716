"""`Trials`: the trials of a study in Optuna's storage, where coordinator, workers and optuna-dashboard meet.

A trial has the plan as parameters, the loss and the costs as values, how far limits are exceeded as constraints, and
what is exact (plan by index, key, costs, problem) as user attributes. It waits until a worker claims it.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmcompress.plan_search.database import (
    GRACE_SECONDS,
    HEARTBEAT_SECONDS,
    RETRIES,
    no_study,
    one_at_a_time,
    refuse_password,
    storage_at,
)
from llmcompress.plan_search.library import optuna_library
from llmcompress.plan_search.patience import Patience, is_down
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem, Proposal

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Claimed:
    """A trial that one worker has, and no other."""

    id: int
    number: int
    key: str
    proposal: Proposal
    costs: Mapping[str, float]
    """What is known without judging."""
    excess: Mapping[str, float]
    """Axis → by which share its limit is exceeded; negative: it is kept."""


@dataclass(frozen=True)
class Finished:
    """A trial that is over."""

    number: int
    key: str
    outcome: Outcome
    worker: str
    began: float
    """Seconds since 1970."""
    seconds: float


class Trials:
    """The trials of one study; every call waits for a database that is down."""

    def __init__(self, study: Study, patience: Patience, changing: AbstractContextManager[object]) -> None:
        self._study, self._patience, self._changing = study, patience, changing
        self._storage, self._id = study._storage, study._study_id  # it remembers what is finished

    @classmethod
    def open(cls, url: str, name: str, *, axes: Sequence[str] | None, patience: Patience) -> Trials:
        """The study of that name; with `axes` it is made where it is not there, to minimize the loss and these costs.

        `url`: of SQLite or PostgreSQL, or `grpc://HOST:PORT` of a proxy that `optuna.storages.run_grpc_proxy_server`
        runs.

        Raises: CompressError when the database cannot be reached for too long, there is no such study, the URL has a
        password, or optuna is missing.
        """
        refuse_password(url)
        optuna = optuna_library()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heartbeats are marked as experimental
            storage = patience(lambda: storage_at(url))
            sampler = optuna.samplers.RandomSampler(seed=0)
            if axes is None:
                try:
                    study = patience(lambda: optuna.load_study(study_name=name, storage=storage, sampler=sampler))
                except KeyError:
                    raise no_study(url, name) from None
            else:
                directions = ["minimize"] * (1 + len(axes))
                study = patience(
                    lambda: optuna.create_study(
                        study_name=name, storage=storage, sampler=sampler, directions=directions, load_if_exists=True
                    )
                )
                patience(lambda: study.set_metric_names(["loss", *axes]))
        return cls(study, patience, one_at_a_time(url))

    def about(self, key: str) -> Any:
        """What the study remembers under that key; None: nothing."""
        return self._patience(lambda: self._storage.get_study_user_attrs(self._id)).get(key)

    def remember(self, key: str, value: Any) -> None:
        """Keep plain data with the study."""
        self._patience(lambda: self._storage.set_study_user_attr(self._id, key, value))

    def enqueue(self, problem: Problem, proposal: Proposal, key: str) -> None:
        """One more trial that waits for a worker."""
        space, costs = problem.space, problem.cost(proposal.plan)
        excess = {axis: costs[axis] / limit - 1.0 for axis, limit in problem.limits.items() if axis in costs}
        optuna = optuna_library()
        chosen = {space.units[index].label: index for index in space.free}
        params: dict[str, Any] = {
            name: space.units[index].options[proposal.plan[index]] for name, index in chosen.items()
        }
        categories = {name: space.units[index].options for name, index in chosen.items()}
        distributions = {
            name: optuna.distributions.CategoricalDistribution(options) for name, options in categories.items()
        }
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=params,
            distributions=distributions,
            user_attrs={
                "key": key,
                "plan": list(proposal.plan),
                "tokens": proposal.tokens,
                "costs": costs,
                "excess": excess,
            },
        )
        self._patience(lambda: self._storage.create_new_trial(self._id, template_trial=trial))

    def claim(self, worker: str) -> Claimed | None:
        """The oldest waiting trial, which this worker has from now on; None: none waits."""
        states = optuna_library().trial.TrialState
        for trial in self._trials(states.WAITING):
            if self._patience(partial(self._set_state, trial, states.RUNNING)):
                for name, value in (("worker", worker), ("claimed", trial.number)):
                    self._patience(partial(self._storage.set_trial_user_attr, trial._trial_id, name, value))
                about = trial.user_attrs
                return Claimed(
                    trial._trial_id, trial.number, str(about["key"]), _proposal(trial), about["costs"], about["excess"]
                )
        return None

    @contextmanager
    def alive(self, claimed: Claimed) -> Iterator[None]:
        """Tell the database from time to time that the worker of this trial lives."""
        record = getattr(self._storage, "record_heartbeat", None)
        if record is None:  # a proxy has no heartbeats
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while True:
                try:
                    record(claimed.id)
                except Exception as problem:
                    if not is_down(problem):
                        raise
                if over.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def finish(self, claimed: Claimed, outcome: Outcome) -> None:
        """Tell the outcome. One that is not valid, or exceeds a limit, is infeasible by constraint.

        A trial that was given to another worker meanwhile stays that one's.
        """
        over = optuna_library().exceptions.UpdateFinishedTrialError
        self._patience(lambda: self._tell(claimed, outcome, over))

    def _tell(self, claimed: Claimed, outcome: Outcome, over: type[Exception]) -> None:
        constraints = {"failed": 0.0 if outcome.is_valid else 1.0, **claimed.excess}
        _, *axes = self._study.metric_names or ("loss",)
        values = [outcome.loss, *(outcome.costs.get(axis, math.inf) for axis in axes)]
        try:
            for name, value in {"costs": dict(outcome.costs), "problem": outcome.problem}.items():
                self._storage.set_trial_user_attr(claimed.id, name, value)
            for name, excess in constraints.items():
                self._storage.set_trial_system_attr(claimed.id, f"constraints:{name}", excess)
            state = optuna_library().trial.TrialState.COMPLETE
            with self._changing:
                self._storage.set_trial_state_values(claimed.id, state=state, values=values)
        except over:
            return

    def finished(self) -> list[Finished]:
        """All trials that have an outcome, in order; those whose workers died every time have one that is not valid."""
        states = optuna_library().trial.TrialState
        found = []
        for trial in self._trials(states.COMPLETE, states.FAIL):
            if trial.state == states.FAIL and len(trial.system_attrs.get("retry_history", ())) < RETRIES:
                continue  # it is tried again
            proposal, costs = _proposal(trial), trial.user_attrs.get("costs", {})
            problem = trial.user_attrs.get("problem")
            loss = trial.values[0] if trial.values else math.inf
            if trial.state == states.FAIL:
                problem = f"its worker died, {1 + RETRIES} times"
            began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            ended = trial.datetime_complete.timestamp() if trial.datetime_complete else began
            found.append(
                Finished(
                    trial.number,
                    str(trial.user_attrs["key"]),
                    Outcome(proposal.plan, proposal.tokens, loss, costs, problem),
                    _worker(trial),
                    began,
                    ended - began,
                )
            )
        return found

    def plan(self, number: int) -> Plan | None:
        """What that trial was about; None: there is no such trial."""
        trials = self._patience(lambda: self._storage.get_all_trials(self._id, deepcopy=False))
        found = (_proposal(trial).plan for trial in trials if trial.number == number and "plan" in trial.user_attrs)
        return next(found, None)

    def unfinished(self) -> dict[str, str]:
        """Key → worker, empty where none has it yet, of trials that wait or run."""
        states = optuna_library().trial.TrialState
        return {str(trial.user_attrs["key"]): _worker(trial) for trial in self._trials(states.WAITING, states.RUNNING)}

    def retry_dead(self, dead: Sequence[str] = ()) -> None:
        """Trials of these workers, and of those whose heartbeat stopped, fail; they are enqueued again, once."""
        optuna = optuna_library()
        states = optuna.trial.TrialState
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heartbeats are marked as experimental
            again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
            for trial in self._trials(states.RUNNING):
                worker, began = _worker(trial), trial.datetime_start
                unowned = not worker and began is not None and time.time() - began.timestamp() > GRACE_SECONDS
                if worker in dead or unowned:
                    self._patience(partial(self._fail, trial, again))
            with self._changing:
                self._patience(lambda: optuna.storages.fail_stale_trials(self._study))

    def _set_state(self, trial: FrozenTrial, state: Any) -> bool:
        try:
            with self._changing:
                return self._storage.set_trial_state_values(trial._trial_id, state=state)
        except optuna_library().exceptions.UpdateFinishedTrialError:
            return False

    def _fail(self, trial: FrozenTrial, again: Callable[[Study, FrozenTrial], None]) -> None:
        if self._set_state(trial, optuna_library().trial.TrialState.FAIL):
            again(self._study, self._storage.get_trial(trial._trial_id))

    def _trials(self, *states: Any) -> list[FrozenTrial]:
        def read() -> list[FrozenTrial]:
            return [
                trial
                for trial in self._storage.get_all_trials(self._id, deepcopy=False, states=states)
                if "key" in trial.user_attrs
            ]

        return self._patience(read)


def _worker(trial: FrozenTrial) -> str:
    """Who claimed it; empty: no worker yet.

    A repetition begins with the attributes of the trial that failed, so the name alone may be the dead worker's.
    """
    about = trial.user_attrs
    return str(about["worker"]) if about.get("claimed") == trial.number else ""


def _proposal(trial: FrozenTrial) -> Proposal:
    return Proposal(tuple(trial.user_attrs["plan"]), int(trial.user_attrs["tokens"]))
