"""What the documents promise: commands that exist, code that runs, paths that are there, tables that are current."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from llmcompress.cli.main import llmcompress
from llmcompress.errors import ExitCode
from llmcompress.passes.base import PASSES
from llmcompress.presets import load_preset
from llmcompress.recipe import parse_recipe
from tests.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "evals" / "README.md", *(ROOT / "docs").rglob("*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_LINE, METHODS, REPOSITORY = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("command-line", "methods", "repository")
)
RUN = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("command-line", "python", "recipes"))]
"""Documents with blocks that the tests run."""


@dataclass(frozen=True)
class Block:
    """A fenced block; `runs` when the line above it says that the tests run it."""

    language: str
    text: str
    runs: bool


def blocks(text: str) -> list[Block]:
    found = re.findall(r"(<!-- tests: run -->\n)?^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(language, body, bool(marker)) for marker, language, body in found]


def command_lines(text: str) -> list[list[str]]:
    """Every line of a fenced or indented block that begins with one of our programs, as words."""
    fenced = [line for block in blocks(text) for line in block.text.splitlines()]
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    starts = ("llmcompress ", "python3 scripts/", "python scripts/", "python evals/")
    return [shlex.split(line.split(" > ")[0], comments=True) for line in fenced + indented if line.startswith(starts)]


def parse(words: list[str]) -> click.Context:
    """What click makes of a command line, without running it.

    Raises: click.ClickException for anything the program would refuse.
    """
    context, command, rest = click.Context(llmcompress), llmcompress, words[1:]
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, words
        context = click.Context(found, parent=context, info_name=name)
        command = found
    return command.make_context(context.info_name, rest, parent=context.parent)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_are_ones_the_programs_accept(document):
    for words in command_lines(document.read_text(encoding="utf-8")):
        if words[0] != "llmcompress":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            flags = [word for word in words[2:] if word.startswith("--")]
            assert all(f'"{flag}"' in source for flag in flags), words
            continue
        options = parse(words).params
        if options.get("preset"):
            load_preset(options["preset"], settings=options["settings"])


def test_a_command_that_does_not_exist_is_noticed():
    for words in (["llmcompress", "compres"], ["llmcompress", "compress", "m", "--presett", "w4"]):
        with pytest.raises(click.ClickException):
            parse(words)


@pytest.mark.parametrize("document", RUN, ids=named)
def test_what_a_document_says_it_runs_does_run(document, tmp_path, monkeypatch):
    """Python blocks of a document are one program: later ones see the names of earlier ones."""
    monkeypatch.chdir(tmp_path)
    running = [block for block in blocks(document.read_text(encoding="utf-8")) if block.runs]
    names: dict[str, object] = {}
    for block in running:
        if block.language == "python":
            exec(compile(block.text, document.name, "exec"), names)
        elif block.language == "yaml":
            recipe = parse_recipe(block.text, document.name)
            assert parse_recipe(recipe.to_yaml(), "again") == recipe
        else:
            for words in command_lines(f"```bash\n{block.text}```\n"):
                result = CliRunner().invoke(llmcompress, words[1:], catch_exceptions=False)
                assert result.exit_code == 0, (words, result.output)
    assert running


def test_no_other_document_says_that_it_runs():
    others = [document for document in DOCUMENTS if document not in RUN]
    assert not [path for path in others if any(block.runs for block in blocks(path.read_text(encoding="utf-8")))]


def test_the_documentation_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([^)#\s]+)", index))


def test_python_takes_at_most_five_lines():
    first = next(block for block in blocks(README) if block.language == "python")
    assert len(first.text.strip().splitlines()) <= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_python_in_documents_compiles(document):
    for block in blocks(document.read_text(encoding="utf-8")):
        if block.language == "python" and block.runs:
            ast.parse(block.text)


def test_the_guide_shows_the_pass_as_it_is():
    source = (ROOT / "llmcompress" / "passes" / "quantization" / "rtn.py").read_text(encoding="utf-8")
    shown = [block.text for block in blocks((ROOT / "docs" / "add-an-algorithm.md").read_text(encoding="utf-8"))]
    assert shown
    assert not [text for text in shown if text not in source]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert not [target for target in targets if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_paths_named_are_there(document):
    text = document.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:configs|docs|evals|llmcompress|scripts|tests)/[^`\s*{]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def tree() -> set[str]:
    """Paths in the tree of docs/repository.md, relative to the root."""
    text = next(block.text for block in blocks(REPOSITORY) if block.language == "text")
    paths, folder = set(), ""
    for line in text.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        paths.add((folder + name if line.startswith(" ") else name).rstrip("/"))
    return paths


def test_the_tree_lists_what_is_there_and_nothing_else():
    listed = tree()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    top = {path.split("/")[0] for path in tracked} - {".gitignore"}
    package = {path for path in (ROOT / "llmcompress").iterdir() if not path.name.startswith("__")}
    inside = {named(path) for path in package if path.is_dir() or path.suffix == ".py"}
    assert not [path for path in listed if not (ROOT / path).exists()]
    assert (top | inside) - listed == set()


def test_families_named_are_the_families_tested():
    paragraph = METHODS.split("Tested families:")[1].split(".")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == {make().model_type for make in FAMILIES.values()}


def test_the_readme_counts_what_there_is():
    families, methods = len({make().model_type for make in FAMILIES.values()}), len(list(PASSES))
    text = " ".join(README.split())
    assert f"{families} tested model families" in text and f"Over {methods // 10 * 10} methods" in text


def test_exit_codes_named_are_the_exit_codes():
    table = COMMAND_LINE.split("| Exit code |")[1].split("\n\n")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == set(ExitCode)


def test_result_tables_are_current():
    check = subprocess.run([sys.executable, "evals/table.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_the_two_commands_are_the_ones_ci_runs():
    marked = README.split("<!-- ci: these two commands -->\n```bash\n")[1].split("```")[0]
    assert len(marked.strip().splitlines()) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=named)
def test_yaml_files_say_first_what_they_are(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
