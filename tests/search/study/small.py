"""A small space on a model that exists only as a map, a judge that computes a number, and a study around them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

from llmcompress.model.probe import probe
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.coordinator import Coordinator
from llmcompress.plan_search.judging import FunctionJudge, Judge
from llmcompress.plan_search.optimizers.base import AskTell, Optimizer, Proposals
from llmcompress.plan_search.patience import Patience
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome, Problem, Proposal
from llmcompress.plan_search.space import Space
from llmcompress.plan_search.study_folder import StudyFolder, new_worker_name
from llmcompress.plan_search.trials import Trials
from llmcompress.plan_search.worker import Desk, work
from llmcompress.progress import Silent

SPACE = Space.model_validate(
    {
        "sites": {
            "int8": [{"rtn": {"scheme": "int8_g16"}}],
            "int4": [{"rtn": {"scheme": "int4_g16"}}],
            "int2": [{"rtn": {"scheme": "int2_g16"}}],
        },
        "per": "block",
        "most_dropped": 0.5,
    }
)


@cache
def plan_space() -> PlanSpace:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return PlanSpace(SPACE, probe(config, unfuse=True))


def bytes_of() -> Additive:
    space = plan_space()
    of_sites = {index: np.array([[8.0, 4.0, 2.0]]) for index, unit in enumerate(space.units) if unit.kind == "sites"}
    return Additive(10.0, {}, of_sites)


def problem(limits: Mapping[str, float] | None = None) -> Problem:
    return Problem(space=plan_space(), costs={"bytes": bytes_of()}, limits=limits or {}, stages=(4, 8))


def loss_of(plan: Plan) -> float:
    """Fewer bits lose more, early blocks most."""
    return float(sum((choice + 1) ** 2 / (3 + index) for index, choice in enumerate(plan)))


def outcome(plan: Plan, tokens: int) -> Outcome:
    return Outcome(plan, tokens, loss_of(plan) + 1 / tokens, {"bytes": bytes_of().total(plan_space(), plan)})


class Counting:
    """A judge that remembers what it was asked."""

    fingerprint = "small"

    def __init__(self) -> None:
        self.asked: list[tuple[Plan, int]] = []

    def __call__(self, plan: Plan, tokens: int) -> Outcome:
        self.asked.append((plan, tokens))
        return outcome(plan, tokens)


class Walk(Optimizer):
    """Random plans, then neighbours of the best one: what it asks depends on what it was told."""

    def proposals(self, problem: Problem, random: np.random.Generator) -> Proposals:
        told = yield [Proposal(problem.space.random(random), problem.stages[0]) for _ in range(3)]
        while True:
            best = min(told, key=lambda each: each.loss)
            near = list(problem.space.neighbours(best.plan))
            picked = random.choice(len(near), size=3, replace=False)
            told = yield [
                *(Proposal(near[index], problem.stages[0]) for index in picked),
                Proposal(best.plan, problem.stages[1]),
            ]


def trials(folder: StudyFolder, *, url: str | None = None, patience: Patience | None = None) -> Trials:
    folder.path.mkdir(parents=True, exist_ok=True)
    return Trials.open(folder.url_of(url), "test", axes=["bytes"], patience=patience or Patience(seconds=0.0))


def desk(folder: StudyFolder, found: Trials, judge: Judge, **options: Any) -> Desk:
    worker = folder.worker(new_worker_name())
    worker.begin()
    return Desk(trials=found, judge=judge, worker=worker, **options)


def searched(
    folder: StudyFolder, judge: Judge, *, count: int = 12, url: str | None = None, **options: Any
) -> list[Outcome]:
    """A whole search in this process, as the command makes it."""
    found = trials(folder, url=url)
    known = folder.outcomes(options.get("progress", Silent()))
    own = desk(folder, found, judge, known=known)
    try:
        coordinator = Coordinator(
            problem=problem(),
            trials=found,
            judge_fingerprint=judge.fingerprint,
            desk=own,
            dead_workers=lambda: [each.name for each in folder.workers() if not each.is_alive],
            sleep=lambda seconds: time.sleep(0.01),
        )
        found_all = coordinator.run(AskTell(Walk(trials=count), problem()), count)
        coordinator.end()
        return found_all
    finally:
        own.worker.end()


def study(path: Path) -> StudyFolder:
    return StudyFolder(path / "study")


def function_judge() -> FunctionJudge:
    return FunctionJudge(outcome, "small")


class Marking:
    """A judge that leaves a file per call; the first of all processes wait to be killed."""

    fingerprint = "small"

    def __init__(self, folder: Path, *, hangs: int) -> None:
        self._folder, self._hangs = folder, hangs

    def __call__(self, plan: Plan, tokens: int) -> Outcome:
        (self._folder / f"{os.getpid()}-{time.monotonic_ns()}.asked").touch()
        for number in range(self._hangs):
            try:
                (self._folder / f"hung-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            (self._folder / f"{os.getpid()}.hangs").touch()
            time.sleep(600)
        return outcome(plan, tokens)


def joined(path: Path, judge: Judge, *, url: str | None = None) -> None:
    """A worker that joins a study that was begun, until its search is over."""
    folder = study(path)
    own = desk(folder, trials(folder, url=url), judge)
    work(own, is_wanted=lambda: True, sleep=lambda seconds: time.sleep(0.05))
    own.worker.end()
