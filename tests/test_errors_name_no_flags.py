"""Errors speak to whoever called: Python users read names of arguments, users of the command line read flags."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import llmcompress
from llmcompress.cli.failures import report_failure
from llmcompress.cli.flags import with_flags
from llmcompress.cli.main import llmcompress as command
from llmcompress.errors import CompressError
from tests.test_imports import ROOT, modules, stage_of

FOREIGN = (
    "hf download",
    "pip install",
    "pip wheel",
    "iconv ",
    "llmcompress compress ",
    "llmcompress doctor ",
    "llmcompress export ",
    "`--backend ",
)
"""Programs that are typed whoever reads the error, or the model card."""
FLAG = re.compile(r"(?<![\w(-])--[a-z]|(?<![\w-])-o\b")
"""Not the variables of CSS: `var(--ink)`."""
ARGUMENT = re.compile(r"--?[\w-]+(=\S*)?")
"""A flag alone is handed to a program that we start; a message has more words."""


def texts(path: Path) -> list[tuple[int, str]]:
    """Line and text of every string in a module that is no docstring; of f-strings the parts that are written out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    whole = {
        id(part): ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    return [
        (node.lineno, whole.get(id(node), node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_no_message_of_the_library_names_a_flag_of_the_command_line() -> None:
    named = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in modules()
        if stage_of(path) != "cli"
        for line, text in texts(path)
        if FLAG.search(text) and not ARGUMENT.fullmatch(text) and not any(program in text for program in FOREIGN)
    ]
    assert not named


SPELLINGS = [
    ("another folder, or set `overwrite=True`: it stays", "another folder, or add --overwrite: it stays"),
    ("set `fresh=True` to start again", "add --fresh to start again"),
    ("set `device` to auto, cpu or cuda", "use --device auto, cpu or cuda"),
    ("or name an `output`", "or give a folder with -o"),
]  # fmt: skip


@pytest.mark.parametrize(("python", "flags"), SPELLINGS)
def test_the_command_line_respells_what_python_is_told(python: str, flags: str) -> None:
    assert with_flags(python) == flags


def test_every_setting_named_is_an_argument_there_and_an_option_here() -> None:
    arguments = inspect.signature(llmcompress.compress).parameters
    flags = {flag for option in command.get_command(None, "compress").params for flag in option.opts}
    for python, spelled in SPELLINGS:
        assert set(re.findall(r"`(\w+)[`=]", python)) <= arguments.keys()
        assert set(re.findall(r"--\w+|-o", spelled)) <= flags


def test_every_text_that_names_a_setting_can_be_respelled() -> None:
    """A fix that says `set ...` about an argument of `compress` in another form would reach the terminal as Python."""
    arguments = inspect.signature(llmcompress.compress).parameters.keys() & {"overwrite", "fresh", "offload", "device"}
    for path in modules():
        if stage_of(path) == "cli":
            continue
        for line, text in texts(path):
            if re.search(rf"`({'|'.join(arguments)})[`=]", with_flags(text)):
                pytest.fail(f"{path.relative_to(ROOT)}:{line} {text}")


def test_a_failing_command_shows_flags_on_screen_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        error = CompressError("output.exists", "the output folder is not empty", fix="set `overwrite=True`")
        assert "`overwrite=True`" in str(error)
        report_failure(error, as_json=as_json)
        written = capsys.readouterr()
        shown = json.loads(written.out)["error"]["fix"] if as_json else written.err
        assert "add --overwrite" in shown and "overwrite=True" not in shown
