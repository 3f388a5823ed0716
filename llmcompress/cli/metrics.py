"""The options that say what is measured, and what they mean as settings of metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmcompress.errors import CompressError, ExitCode

if TYPE_CHECKING:
    from llmcompress.evaluation.settings.base import MetricSettings

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--suite", metavar="NAME", help="quick, standard or full, or a YAML file: what is measured."),
    click.option(
        "--perplexity",
        "sources",
        metavar="SOURCE",
        multiple=True,
        help="builtin:evaluation, a text file, or a dataset with its split (wikitext2:test). Repeatable. In the place "
        "of the suite's texts. [default without a suite: builtin:evaluation]",
    ),
    click.option(
        "--protocol",
        metavar="NAME",
        help="A published protocol of perplexity: gptq, gptq-c4, gptq-ptb, llm-pruner, wanda, llama-cpp, "
        "lm-eval-rolling. Without --perplexity also its text.",
    ),
    click.option(
        "--window", type=click.IntRange(min=2), help="Tokens per window [default: the model's limit, at most 2048]."
    ),
    click.option("--bos", metavar="WHERE", help="Where the BOS token stands: auto, always, never."),
    click.option(
        "--max-windows", type=click.IntRange(min=1), help="Evaluate only this many windows [default: 16,384 tokens]."
    ),
    click.option("--whole-text", is_flag=True, help="Evaluate all windows."),
    click.option(
        "--tasks",
        "tasks",
        metavar="NAMES",
        help="Tasks of lm-eval, bundled ones or task files, separated by commas. In the place of the suite's tasks.",
    ),
    click.option("--task-data", metavar="DIR", help="The folder with the data of bundled tasks and task files."),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first documents of every task and prompts."),
    click.option(
        "--gate",
        "limits",
        metavar="KEY=VALUE",
        multiple=True,
        help="A limit of the quality gate (kl_mean=0.05), or a YAML file with several. Repeatable. Exit code 6 if a "
        "limit is not kept.",
    ),
)


@dataclass(frozen=True)
class Words:
    """What was typed of these options."""

    suite: str | None
    sources: tuple[str, ...]
    protocol: str | None
    window: int | None
    bos: str | None
    max_windows: int | None
    whole_text: bool
    tasks: str | None
    task_data: str | None
    limit: int | None
    limits: tuple[str, ...]


def metric_options(command: F) -> F:
    """All of them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_of(words: Words) -> tuple[MetricSettings, ...]:
    """The settings of every metric: those of the suite, with what was named beside it in their place.

    Raises: CompressError or click's UsageError for words that make no sense, alone or together.
    """
    from llmcompress.evaluation.settings.generations import GenerationSettings
    from llmcompress.evaluation.settings.perplexity import PerplexityTask
    from llmcompress.evaluation.settings.robustness import RobustnessSettings
    from llmcompress.evaluation.settings.tasks import TaskSettings

    chosen = list(_suite(words))
    if words.sources:
        chosen = [*map(_text, words.sources), *_without(chosen, PerplexityTask)]
    if words.tasks is not None:
        named = [name.strip() for name in words.tasks.split(",") if name.strip()]
        chosen = [*_without(chosen, TaskSettings), *(TaskSettings(task=name) for name in named)]
    chosen = _all_changed(chosen, (PerplexityTask,), _of_texts(words), "a text with --perplexity")
    data = {} if words.task_data is None else {"data": words.task_data}
    chosen = _all_changed(chosen, (TaskSettings, RobustnessSettings), data, "tasks with --tasks")
    limit = {} if words.limit is None else {"limit": words.limit}
    kinds = (TaskSettings, RobustnessSettings, GenerationSettings)
    chosen = _all_changed(chosen, kinds, limit, "tasks with --tasks, or a suite")
    gate = _gate(words.limits)
    return tuple(chosen) if gate is None else (*_without(chosen, type(gate)), gate)


def _without(settings: Sequence[MetricSettings], kind: type[MetricSettings]) -> list[MetricSettings]:
    return [each for each in settings if not isinstance(each, kind)]


def _all_changed(
    settings: Sequence[MetricSettings], kinds: tuple[type[MetricSettings], ...], changes: dict[str, Any], missing: str
) -> list[MetricSettings]:
    """Those of these kinds with the changes.

    Raises: click's UsageError if there are none.
    """
    if changes and not any(isinstance(each, kinds) for each in settings):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changes).replace("--data", "--task-data")
        raise click.UsageError(f"Nothing is measured that {flags} would change: name {missing}.")
    return [_changed(each, changes) if changes and isinstance(each, kinds) else each for each in settings]


def _suite(words: Words) -> Sequence[MetricSettings]:
    """Its metrics; without one the bundled text, unless something else was named."""
    from llmcompress.evaluation.settings.perplexity import BUNDLED_TEXT, PerplexityTask

    if words.suite is not None:
        from llmcompress.suites import load_suite

        return load_suite(words.suite)
    if words.protocol is not None and not words.sources:
        return (PerplexityTask.model_validate(_checked_protocol(words.protocol)),)
    return () if words.sources or words.tasks else BUNDLED_TEXT


def _text(source: str) -> MetricSettings:
    from llmcompress.evaluation.settings.perplexity import PerplexityTask

    if not source:
        raise click.BadParameter("it is empty", param_hint="--perplexity")
    return PerplexityTask.model_validate(PerplexityTask.from_text(source))


def _of_texts(words: Words) -> dict[str, Any]:
    """Options that change how texts are read."""
    if words.whole_text and words.max_windows is not None:
        raise click.UsageError("--whole-text and --max-windows exclude each other.")
    windows = "all" if words.whole_text else words.max_windows
    found = {**_checked_protocol(words.protocol), "window": words.window, "bos": words.bos, "max_windows": windows}
    return {name: value for name, value in found.items() if value is not None}


def _checked_protocol(name: str | None) -> dict[str, str]:
    """As an option of a text; nothing without a name.

    Raises: CompressError naming the nearest protocol.
    """
    from llmcompress.evaluation.settings.protocol import protocol_options

    if name is None:
        return {}
    protocol_options(name)
    return {"protocol": name}


def _changed(settings: MetricSettings, changes: dict[str, Any]) -> MetricSettings:
    """The same settings with some replaced, checked again."""
    from pydantic import ValidationError

    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    try:
        return type(settings).model_validate({**given, **changes})
    except ValidationError as problem:
        first = problem.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ", ".join(changes)
        raise click.BadParameter(str(first["msg"]), param_hint=f"--{name.replace('_', '-')}") from problem


def _gate(limits: Sequence[str]) -> MetricSettings | None:
    """Files and single limits, later ones in the place of earlier ones."""
    from llmcompress.evaluation.settings.gate import Gate
    from llmcompress.recipe.document import Document, read_file, read_value
    from llmcompress.recipe.problems import validated
    from llmcompress.recipe.schema import schema_of

    found: dict[str, Any] = {}
    for written in limits:
        name, equals, value = written.partition("=")
        if equals:
            found[name.strip()] = read_value(value)
        elif Path(written).suffix in (".yaml", ".yml", ".json"):
            found |= read_file(Path(written)).data
        else:
            what = f"{written!r} is neither a limit nor a YAML file"
            fix = "write e.g. kl_mean=0.05"
            raise CompressError("gate.word", what, where="--gate", fix=fix, exit_code=ExitCode.USAGE)
    return validated(Document("--gate", found), Gate, lambda: schema_of(Gate)) if found else None
