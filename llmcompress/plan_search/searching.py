"""`search`: the plan that loses least within limits on bytes, seconds or energy; and workers that join a search."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.baselines import uniform_plans
from llmcompress.plan_search.bench_judge import BenchJudge, bench_judge, supernet_of, whole_windows
from llmcompress.plan_search.coordinator import Coordinator
from llmcompress.plan_search.costs.file_bytes import bytes_of
from llmcompress.plan_search.ending import Found, beside_uniform, found_of, promoted, report_of
from llmcompress.plan_search.finishing import kept_bytes, make_models, recipes_of, to_make, write_recipes
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.library import optuna_library
from llmcompress.plan_search.opening import Subject, costs_of, open_subject
from llmcompress.plan_search.optimizers.additive_optimum import nearest
from llmcompress.plan_search.optimizers.base import AskTell
from llmcompress.plan_search.optimizers.estimated_optima import estimated_optima
from llmcompress.plan_search.patience import Patience
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Problem
from llmcompress.plan_search.processes import WorkerProcesses
from llmcompress.plan_search.settings import Limits, SearchSettings, parse_search, read_search, search_from
from llmcompress.plan_search.study_folder import FRONT, NAME, StudyFolder, new_worker_name, other_study
from llmcompress.plan_search.trials import Trials
from llmcompress.plan_search.worker import Desk
from llmcompress.progress import Progress, ProgressLike, as_progress
from llmcompress.records.search import SearchReport
from llmcompress.report.folder import write_report
from llmcompress.report.searched import written_cost
from llmcompress.storage.atomic import replacing
from llmcompress.storage.paths import from_home

SearchLike = SearchSettings | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Workers:
    """Who judges plans, and where they meet."""

    count: int = 0
    """Processes on this host, one GPU each; 0: this process judges by itself."""
    database: str | None = None
    """`postgresql+psycopg://…`, where workers on other hosts join; None: a SQLite file in the study's folder."""
    study: str = NAME
    """Name of the study in a database that holds several."""
    patience: float = 600.0
    """Seconds to wait for a database that is down."""


def search(
    model: str | Path | None,
    space: SearchLike,
    output: str | Path,
    *,
    limits: Mapping[str, str] | None = None,
    workers: int | Workers = 0,
    device: str = "auto",
    progress: ProgressLike = None,
) -> SearchReport:
    """Search the recipe that loses least within the limits, and compress the model by it into `output`/models.

    `model`: a Hub id, a folder or `builtin:books-llama`; None: the search file names it. `space`: a search file, the
    name of one that comes with the package (`joint`), its text, or its data. `limits` replaces those of the file:
    `{"bytes": "60MB", "decode": "50ms/token"}`. The same call goes on with a search that was interrupted.

    Raises: CompressError for everything a user can cause; with exit code 6 where no plan keeps the limits.
    """
    told = as_progress(progress)
    settings = as_search(space).for_model(None if model is None else str(model))
    if limits is not None:
        given = Limits.model_validate({**settings.limits.given, **limits})
        settings = settings.model_copy(update={"limits": given})
    place = workers if isinstance(workers, Workers) else Workers(workers)
    optuna_library()
    folder = StudyFolder(from_home(str(output)))
    subject = open_subject(settings, device=device, progress=told)
    folder.begin(settings, subject.identity, url=place.database, name=place.study)
    return _Search(subject, folder, place, device, told).run()


def as_search(space: SearchLike) -> SearchSettings:
    """Whatever says what is to be searched → settings.

    Raises: CompressError when it is not a valid search.
    """
    if isinstance(space, SearchSettings):
        return space
    if isinstance(space, Mapping):
        return search_from(dict(space))
    if isinstance(space, str) and "\n" in space:
        return parse_search(space)
    return read_search(space)


@dataclass(frozen=True)
class _Search:
    subject: Subject
    folder: StudyFolder
    place: Workers
    device: str
    progress: Progress

    def run(self) -> SearchReport:
        own = self.folder.worker(new_worker_name())
        coordinating = self.folder.worker("coordinator")
        with ExitStack() as stack:
            for each in (coordinating, own):
                each.begin()
                stack.callback(each.end)
            costs, dense = costs_of(self.subject, self.folder.path, progress=self.progress)
            limits = self.subject.settings.limits.values(dense)
            self._refuse_impossible(costs, limits)
            store = build_levels(
                self.subject.whole, self.subject.space, LevelStore(self.folder.levels), progress=self.progress
            )
            supernet = supernet_of(self.subject)
            bench = stack.enter_context(Bench(self.subject.whole, self.subject.judged_space, store))
            judge = bench_judge(bench, self.subject, store.fingerprint, supernet)
            problem = self._problem(costs, limits, bench, judge, store)
            patience = Patience(self.place.patience, progress=self.progress)
            url, name = self.folder.database()
            trials = Trials.open(url, name, axes=tuple(costs), patience=patience)
            self._claim_study(trials, judge)
            known = self.folder.outcomes(self.progress)
            desk = Desk(trials=trials, judge=judge, worker=own, known=known, progress=self.progress)
            processes = stack.enter_context(self._processes())
            coordinator = Coordinator(
                problem=problem,
                trials=trials,
                judge_fingerprint=judge.fingerprint,
                desk=desk if processes is None else None,
                dead_workers=lambda: self._dead(processes),
                progress=self.progress,
            )
            found = self._searched(coordinator, problem)
            differences = beside_uniform(found, judge)
        report = report_of(
            found,
            self.subject.settings,
            folder=str(self.folder.path),
            dense=dense,
            differences=differences,
            notes=self._notes(problem),
        )
        return self._finished(found, report)

    def _problem(
        self,
        costs: Mapping[str, Additive],
        limits: Mapping[str, float],
        bench: Bench,
        judge: BenchJudge,
        store: LevelStore,
    ) -> Problem:
        subject = self.subject
        stages = whole_windows(subject.settings.judge.stages, subject.judged_NT)
        losses = store.losses(subject.space)
        estimated = estimated_optima(subject.space, losses, costs, limits) if limits else ()
        return Problem(
            space=subject.space,
            costs=costs,
            limits=limits,
            stages=stages,
            losses=losses,
            relaxation=bench.relaxation(judge.text(stages[0])),
            starts=(*(each.plan for each in estimated), *uniform_plans(subject.space).values()),
        )

    def _notes(self, problem: Problem) -> list[str]:
        """What differs from what was asked for; told too."""
        asked, most = max(self.subject.settings.judge.stages), problem.stages[-1]
        is_short = most + self.subject.judged_NT.shape[1] <= asked
        notes = [f"there is text for {most} tokens to judge plans on, {asked} were asked for"] if is_short else []
        for note in notes:
            self.progress.note(note)
        return notes

    def _searched(self, coordinator: Coordinator, problem: Problem) -> Found:
        settings, uniform = self.subject.settings, uniform_plans(self.subject.space)
        (optimizer,) = settings.optimizer
        outcomes = coordinator.run(AskTell(optimizer, problem, seed=settings.seed), optimizer.trials)
        last = promoted(problem, outcomes, uniform, count=settings.finish.front)
        self.progress.stage("judge the front", len(last))
        coordinator.answers(last)
        coordinator.end()
        return found_of(problem, settings, uniform, coordinator.trials.finished())

    def _refuse_impossible(self, costs: Mapping[str, Additive], limits: Mapping[str, float]) -> None:
        """Before any work: that some plan may keep the limits."""
        problem = Problem(space=self.subject.space, costs=costs, limits=limits)
        plan = nearest(problem)
        if not problem.fits(plan):
            raise self._no_plan(plan, problem.cost(plan), limits)

    def _no_plan(self, nearest: Plan, costs: Mapping[str, float], limits: Mapping[str, float]) -> CompressError:
        """The error; the recipe of the nearest plan is there already."""
        folder = self.folder.path / "nearest"
        write_recipes({0: recipe_of(self.subject.space, nearest, self.subject.recipe_settings)}, folder)
        return no_plan(costs, limits, str(folder / "0.yaml"))

    def _claim_study(self, trials: Trials, judge: BenchJudge) -> None:
        known = trials.about("judge")
        if known not in (None, judge.fingerprint):
            raise other_study(self.folder)
        trials.remember("judge", judge.fingerprint)
        trials.remember("settings", self.subject.settings.to_yaml())
        trials.remember("over", None)

    @contextmanager
    def _processes(self) -> Iterator[WorkerProcesses | None]:
        if not self.place.count:
            yield None
            return
        with WorkerProcesses(self._command, self.place.count, self.folder.path / "logs") as processes:
            yield processes

    def _command(self, index: int) -> Sequence[str]:
        device, count = self.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count and device in ("auto", "cuda"):
            device = f"cuda:{index % count}"
        join = ["-m", "llmcompress", "search", "--join", str(self.folder.path), "--device", device]
        return [sys.executable, *join]

    def _dead(self, processes: WorkerProcesses | None) -> list[str]:
        if processes is not None:
            processes.tend()
        return [each.name for each in self.folder.workers() if not each.is_alive]

    def _finished(self, found: Found, report: SearchReport) -> SearchReport:
        subject, path = self.subject, self.folder.path
        recipes = recipes_of(found, subject.recipe_settings)
        write_recipes(recipes, self.folder.recipes)
        sizes = found.problem.costs.get("bytes") or bytes_of(subject.space, subject.known, subject.recipe_settings)
        bits = torch.finfo(subject.whole.context.storage_dtype).bits
        kept = {found.number(each): kept_bytes(subject.space, each.plan, sizes, bits) for each in found.front}
        report = report.model_copy(update={"kept": kept})
        write_front(report, path)
        if found.selected is None and found.nearest is None:
            raise nothing_judged(next((each.outcome.problem for each in found.trials), None), path)
        if found.selected is None and found.nearest is not None:
            raise self._no_plan(found.nearest.plan, found.nearest.costs, found.problem.limits)
        outcomes = to_make(found, subject.settings.finish.compress)
        made = make_models(found, recipes, outcomes, path / "models", device=self.device, progress=self.progress)
        report = report.model_copy(update={"made": made})
        write_front(report, path)
        write_report(report, path / "report")
        return report


def write_front(report: SearchReport, folder: Path) -> None:
    """As JSON, whole or not at all."""
    with replacing(folder / FRONT) as part:
        part.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


def no_plan(costs: Mapping[str, float], limits: Mapping[str, float], recipe: str) -> CompressError:
    """No plan keeps the limits; the one that exceeds them least costs so much."""
    over = [
        f"{axis} {written_cost(costs[axis], axis)} instead of {written_cost(limit, axis)}"
        for axis, limit in limits.items()
        if axis in costs and costs[axis] > limit
    ]
    return CompressError(
        "search.infeasible",
        f"no plan of the space keeps the limits; the nearest has {', '.join(over)}",
        where=recipe,
        fix="raise the limits, or add cheaper options to the space",
        saved=f"the recipe of the nearest plan: {recipe}",
        exit_code=ExitCode.GATE,
    )


def nothing_judged(problem: str | None, folder: Path) -> CompressError:
    """No trial has an outcome."""
    return CompressError(
        "search.no-outcome",
        f"no plan could be judged: {problem or 'the optimizer proposed none'}",
        where=str(folder),
        fix="correct what the message says, and search into another folder",
        saved="all trials",
    )
