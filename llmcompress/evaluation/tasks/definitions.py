"""Finds tasks: those in `evals/tasks` (with their data in a folder of the user's), task files, and lm-eval's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import CompressError, ExitCode, did_you_mean, near_names
from llmcompress.evaluation.settings.tasks import TASK_FILES
from llmcompress.storage.paths import from_home

WHERE = "evaluate.tasks"

_PACKAGE = Path(__file__).parent.parent.parent

_OF_GROUPS = ("group", "group_alias", "task", "tag", "aggregate_metric_list")
"""Keys of a group's file that say nothing of its tasks."""


def require_lm_eval() -> None:
    """Raises: CompressError when lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as problem:
        raise CompressError(
            "tasks.not-installed",
            f"tasks are evaluated by lm-eval, which cannot be imported ({problem})",
            where=WHERE,
            fix='pip install "llmcompress[eval]"',
        ) from None


def task_folder() -> Path:
    """`evals/tasks` of a checkout, `llmcompress/evals/tasks` of an installed wheel."""
    inside = _PACKAGE / "evals" / "tasks"
    return inside if inside.is_dir() else _PACKAGE.parent / "evals" / "tasks"


def bundled_tasks() -> dict[str, Path]:
    """Name → file of the tasks that come with the package; their names are read without lm-eval."""
    found = {}
    for file in sorted(task_folder().glob("*.yaml")):
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in ("task", "group") and value.strip():
                found[value.strip()] = file
                break
    return found


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their documents read."""

    tasks: Mapping[str, Any]
    """lm-eval's objects by name."""
    groups: Mapping[str, tuple[str, ...]]
    """Groups of tasks, by the names of their tasks."""


class TaskLoader:
    """Loads tasks of several settings; lm-eval's own index is read once, and only where a name needs it."""

    def __init__(self) -> None:
        require_lm_eval()
        self._managers: dict[bool, Any] = {}

    def load(self, name: str, *, data: str | None) -> LoadedTasks:
        """A task by name, with all its documents.

        A name is one of `bundled_tasks`, a path to a task file, or a task, group or tag of lm-eval. `data` is the
        folder that relative data files of task files are in; without it they are looked for beside the task file.

        Raises: CompressError for an unknown name, a damaged task file, or data that are missing or cannot be fetched.
        """
        file = _file(name)
        if file is not None:
            specs = _definitions(file, data)
            found = _loaded(self._manager(of_lm_eval=False), specs, name)
            names = tuple(str(each["task"]) for each in specs)
            return LoadedTasks(found["tasks"], {} if len(names) == 1 else {_group_of(file): names})
        manager = self._manager(of_lm_eval=True)
        if name not in manager.task_index:
            raise _unknown(name, manager.all_tasks)
        found = _loaded(manager, [name], name)
        groups = {
            group: tuple(sorted(each.task_name for each in holder.get_all_tasks()))
            for group, holder in (found.get("groups") or {}).items()
        }
        return LoadedTasks(found["tasks"], groups)

    def _manager(self, *, of_lm_eval: bool) -> Any:
        """lm-eval reads 14,000 task files to know its names: seconds that only its own tasks need."""
        from lm_eval.tasks import TaskManager

        if of_lm_eval not in self._managers:
            self._managers[of_lm_eval] = TaskManager(include_defaults=of_lm_eval)
        return self._managers[of_lm_eval]


def _file(name: str) -> Path | None:
    """The task file of that name; None for what can only be a name of lm-eval."""
    bundled = bundled_tasks()
    if name in bundled:
        return bundled[name]
    if not name.endswith(TASK_FILES):
        return None
    file = from_home(name)
    if not file.is_file():
        what = f"there is no task file {name}"
        raise CompressError("tasks.no-file", what, where=WHERE, fix="check the path", exit_code=ExitCode.USAGE)
    return file


def _definitions(file: Path, data: str | None) -> list[dict[str, Any]]:
    """The task of a file, or the tasks of a group that it defines, with the paths of their data resolved.

    Raises: CompressError when it is no task file, or its data are missing.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        written: dict[str, Any] = load_yaml(file)
    except Exception as problem:  # YAML, includes and functions of the file's own
        raise _bad_file(file, first_line(problem)) from problem
    members = written.get("task")
    if isinstance(members, str):
        return [_with_data(written, file, data)]
    if not isinstance(members, list) or not all(isinstance(each, dict) and "task" in each for each in members):
        raise _bad_file(file, "`task` must be a name, or in a group a list of tasks, each with its own `task`")
    group = str(written.get("group", file.stem))
    shared = {key: value for key, value in written.items() if key not in _OF_GROUPS}
    tasks = [{**shared, **each, "task": f"{group}_{each['task']}"} for each in members]
    return [_with_data(task, file, data) for task in tasks]


def _bad_file(file: Path, problem: str) -> CompressError:
    what, fix = f"{file.name} is not a task file: {problem}", "see lm-eval's guide to new tasks, and evals/tasks"
    return CompressError("tasks.bad-file", what, where=str(file), fix=fix)


def _group_of(file: Path) -> str:
    return next((name for name, known in bundled_tasks().items() if known == file), file.stem)


def _with_data(task: dict[str, Any], file: Path, data: str | None) -> dict[str, Any]:
    arguments = task.get("dataset_kwargs")
    if not isinstance(arguments, dict) or "data_files" not in arguments:
        return task
    files = _mapped(arguments["data_files"], lambda written: _data_file(written, file, data))
    return {**task, "dataset_kwargs": {**arguments, "data_files": files}}


def _mapped(files: Any, change: Callable[[str], str]) -> Any:
    """`data_files` is a path, a list of paths, or either of them by split."""
    if isinstance(files, dict):
        return {split: _mapped(each, change) for split, each in files.items()}
    return [change(str(each)) for each in files] if isinstance(files, list) else change(str(files))


def _data_file(written: str, file: Path, data: str | None) -> str:
    """In the folder of the user's, or beside the task file."""
    if "://" in written:
        return written
    beside = file.parent / written
    places = [beside] if data is None else [from_home(data) / written, beside]
    for place in places:
        if place.is_file():
            return str(place.resolve())
    if data is None:
        fix = f"set `data` to the folder that has {written} in it"
    else:
        fix = f"put {written} there, or set `data` to another folder"
    what = f"the data of the task {file.stem} are not there: {places[0]}"
    raise CompressError("tasks.no-data", what, where=WHERE, fix=fix)


def _unknown(name: str, lm_eval_names: Iterable[str]) -> CompressError:
    """Of 14,000 names only near ones are listed."""
    known = [*bundled_tasks(), *lm_eval_names]
    near = near_names(name, known)
    fix = did_you_mean(name, near) if near else f"bundled: {', '.join(bundled_tasks())}; all others: lm-eval ls tasks"
    return CompressError("tasks.unknown", f"unknown task {name!r}", where=WHERE, fix=fix, exit_code=ExitCode.USAGE)


def _loaded(manager: Any, specs: list[Any], name: str) -> dict[str, Any]:
    """Reads the data, which may be on the Hub; never with `trust_remote_code`."""
    import datasets

    try:
        with _without_bars():
            found: dict[str, Any] = manager.load(specs)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as problem:
        what = f"the data of {name} cannot be read: {first_line(problem)}"
        fix = "check the network and HF_HUB_OFFLINE; builtin_word_order needs no network"
        raise CompressError("tasks.data", what, where=WHERE, fix=fix, exit_code=ExitCode.HUB) from problem
    except (ValueError, KeyError, TypeError, ImportError) as problem:
        what = f"lm-eval cannot load {name}: {first_line(problem)}"
        fix = "correct the task file, or install what the task needs"
        raise CompressError("tasks.cannot-load", what, where=WHERE, fix=fix) from problem
    return found


def first_line(problem: Exception) -> str:
    """Of a message of another library."""
    return " ".join(str(problem).split())[:300]


@contextmanager
def _without_bars() -> Iterator[None]:
    """`datasets` shows one for every small file that it reads."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
