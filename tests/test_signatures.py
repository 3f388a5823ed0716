"""Laws of how the rooms speak to each other: short argument lists, and a flow that fits on a screen."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmcompress
from tests.test_imports import PACKAGE, modules, stage_of

MOST = 7
"""Parameters of anything that another room calls; more than that wants a type with a name."""

MOST_PUBLIC = 10
"""Of the functions in `llmcompress.__all__`, where the name of an argument is all that a user reads (decision 0024)."""

SCREEN = 50
"""Lines of the flow itself, `pipeline._compress`."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def parameters(function: Function) -> list[str]:
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    unnamed = [each.arg for each in (given.vararg, given.kwarg) if each]
    return [name for name in (*named, *unnamed) if name not in ("self", "cls")]


def names_used(tree: ast.AST) -> set[str]:
    """Every name that could call something: `f(…)`, `thing.f(…)`, `f` handed on; a class stands for its `__init__`."""
    plain = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return plain | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def long_between_rooms(sources: dict[Path, str], most: dict[str, int]) -> list[str]:
    """Functions and constructors with too many parameters whose name another room uses."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    users = defaultdict[str, set[str]](set)
    for path, tree in trees.items():
        for name in names_used(tree):
            users[name].add(stage_of(path))
    found = []
    for path, tree in trees.items():
        constructors = {
            id(function): each.name
            for each in ast.walk(tree)
            if isinstance(each, ast.ClassDef)
            for function in each.body
            if isinstance(function, Function) and function.name == "__init__"
        }
        for function in functions(tree):
            name = constructors.get(id(function), function.name)
            if name.startswith("_") or not users[name] - {stage_of(path)}:
                continue
            count, allowed = len(parameters(function)), most.get(f"{stage_of(path)}.{name}", MOST)
            if count > allowed:
                found.append(f"{path.relative_to(PACKAGE)}:{function.lineno} {name} has {count} parameters")
    return found


def test_no_argument_list_between_rooms_is_long():
    # the command line's functions are called by click, which names every argument
    sources = {path: path.read_text(encoding="utf-8") for path in modules()}
    commands = {f"cli.{path.stem}": 99 for path in sources if stage_of(path) == "cli"}
    public = {f"{stage}.{name}": MOST_PUBLIC for name in llmcompress.__all__ for stage in ("pipeline", "model_export")}
    assert not long_between_rooms(sources, {**public, **commands})


def test_a_long_argument_list_is_noticed_only_where_another_room_uses_it():
    long = "def far(a, b, c, d, *, e, f, g, h): ...\ndef near(a, b, c, d, *, e, f, g, h): ...\n"
    built = "class Thing:\n def __init__(self, a, b, c, d, e, f, g, h): ...\n def method(self, a, b, c, d): ..."
    used = "from llmcompress.model.x import Thing, far\nThing(1).method()\nfar(1)"
    sources = {PACKAGE / "model" / "x.py": long + built, PACKAGE / "passes" / "y.py": used}
    assert [each.split(" ", 1)[1] for each in long_between_rooms(sources, {})] == [
        "far has 8 parameters",
        "Thing has 8 parameters",
    ]
    assert len(long_between_rooms(sources, {"model.far": 8})) == 1


def test_the_flow_fits_on_a_screen():
    tree = ast.parse((PACKAGE / "pipeline.py").read_text(encoding="utf-8"))
    (flow,) = (each for each in functions(tree) if each.name == "_compress")
    assert flow.end_lineno is not None
    assert flow.end_lineno - flow.lineno + 1 <= SCREEN


ONCE = {
    r"get_close_matches\(": "errors.py",
    r"os\.replace\(": "storage/atomic.py",
    r"__version__\.(split|partition)\(": "loading/versions.py",
}
"""What has one place, and where that is: hints for unknown words, replacing a file, the major of transformers."""


@pytest.mark.parametrize("call", ONCE)
def test_what_has_one_place_is_done_nowhere_else(call):
    found = [path for path in modules() if re.search(call, path.read_text(encoding="utf-8"))]
    assert [str(path.relative_to(PACKAGE)) for path in found] == [ONCE[call]]
