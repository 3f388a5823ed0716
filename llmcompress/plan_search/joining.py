"""`join`: one more worker of a search that runs in another process, on this host or another one."""

from __future__ import annotations

import os
from pathlib import Path

from llmcompress.plan_search.bench_judge import bench_judge, supernet_of
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.library import optuna_library
from llmcompress.plan_search.opening import Subject, open_subject
from llmcompress.plan_search.patience import Patience
from llmcompress.plan_search.settings import parse_search
from llmcompress.plan_search.study_folder import NAME, StudyFolder, new_worker_name, other_study
from llmcompress.plan_search.trials import Trials
from llmcompress.plan_search.worker import Desk, work
from llmcompress.progress import Progress, ProgressLike, as_progress
from llmcompress.storage.paths import from_home


def join(
    folder: str | Path,
    *,
    device: str = "auto",
    database: str | None = None,
    name: str = NAME,
    progress: ProgressLike = None,
) -> int:
    """Judge plans of a search that runs elsewhere, until it is over; how many were judged.

    `folder`: that of the study, or with `database` a folder of this host, where levels are made once more.

    Raises: CompressError when there is no such study, or the levels here are not those of the study.
    """
    told, place = as_progress(progress), StudyFolder(from_home(str(folder)))
    optuna_library()
    patience = Patience(progress=told)
    if database is not None and not place.exists:
        trials = Trials.open(database, name, axes=None, patience=patience)
        settings = parse_search(str(trials.about("settings")))
    else:
        settings = place.settings()
    subject = open_subject(settings, device=device, progress=told)
    if not place.exists:
        place.begin(settings, subject.identity, url=database, name=name)
    url, name = place.database()
    trials = Trials.open(url, name, axes=None, patience=patience)
    worker, parent = place.worker(new_worker_name()), os.getppid()
    worker.begin()
    try:
        store = _levels(subject, place, told)
        supernet = supernet_of(subject)
        with Bench(subject.whole, subject.judged_space, store) as bench:
            judge = bench_judge(bench, subject, store.fingerprint, supernet)
            if trials.about("judge") != judge.fingerprint:
                raise other_study(place)
            desk = Desk(trials=trials, judge=judge, worker=worker, known=place.outcomes(told), progress=told)
            told.stage("search", 0)
            return work(desk, is_wanted=lambda: os.getppid() == parent)
    finally:
        worker.end()


def _levels(subject: Subject, folder: StudyFolder, progress: Progress) -> LevelStore:
    """Those of the folder, which are complete where a coordinator works in it; made here where it does not."""
    store = LevelStore(folder.levels)
    if folder.worker("coordinator").is_alive:
        return store
    return build_levels(subject.whole, subject.space, store, progress=progress)
