"""A trial of a study as an ordinary recipe: `study:17`, or `study` for the selected one."""

from __future__ import annotations

from llmcompress.errors import CompressError, ExitCode
from llmcompress.known_model import known_model
from llmcompress.loading.source import find_source
from llmcompress.plan_search.costs.file_bytes import with_settled_format
from llmcompress.plan_search.patience import Patience
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.study_folder import FRONT, StudyFolder
from llmcompress.plan_search.trials import Trials
from llmcompress.recipe import Recipe, read_recipe
from llmcompress.records.search import SearchReport
from llmcompress.storage.json_file import read_json
from llmcompress.storage.paths import from_home

WAIT_SECONDS = 5.0
"""For the database: this is a question, no work of hours."""


def recipe_from_study(named: str) -> Recipe:
    """The recipe of a trial; of those that have no file yet it is made from the trial's plan.

    Raises: CompressError when there is no such study or trial.
    """
    path, number = _split(named)
    folder = StudyFolder(from_home(path))
    settings = folder.settings()
    if number is None:
        number = _selected(folder)
    written = folder.recipes / f"{number}.yaml"
    if written.is_file():
        return read_recipe(written)
    url, name = folder.database()
    trials = Trials.open(url, name, axes=None, patience=Patience(WAIT_SECONDS, saved="nothing was changed"))
    plan = trials.plan(number)
    if plan is None:
        raise _no_trial(named, f"the study has no trial {number}")
    source = find_source(str(settings.model), revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    known = known_model(source, trust_remote_code=settings.trust_remote_code)
    space = PlanSpace(settings.space, known.map)
    return recipe_of(space, plan, with_settled_format(space, known, settings.recipe_settings()))


def _split(named: str) -> tuple[str, int | None]:
    """A folder may have a colon in its name: only a number behind the last one is a trial."""
    path, colon, last = named.rpartition(":")
    if colon and last.isdecimal():
        return path, int(last)
    return named.removesuffix(":"), None


def _selected(folder: StudyFolder) -> int:
    found = SearchReport.model_validate(
        read_json(folder.path / FRONT, code="search.unfinished", fix="finish the search, or name a trial: `study:17`")
    )
    if found.selected is None:
        raise _no_trial(str(folder.path), "no plan of this study keeps the limits")
    return found.selected


def _no_trial(named: str, what: str) -> CompressError:
    return CompressError(
        "search.no-trial", what, where=named, fix="name one of the report, e.g. `study:17`", exit_code=ExitCode.USAGE
    )
