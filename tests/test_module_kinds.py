"""`isinstance` on a kind of compressed module stands in that kind's own file only: everyone else asks the module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmcompress"
BASES = PACKAGE / "modules" / "base.py"
"""What anybody may ask for: the classes that all kinds derive from."""


def kinds() -> dict[str, Path]:
    """Class → file, of every module in `modules/` and `formats/` that derives from torch's, directly or not."""
    files = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for room in ("modules", "formats")
        for path in (PACKAGE / room).rglob("*.py")
    }
    classes = [(node, path) for path, tree in files.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = {node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases} for node, _ in classes}
    found = {"Module", "ModuleList"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return {node.name: path for node, path in classes if node.name in found and path != BASES}


def asked(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every class that `isinstance`, `issubclass`, a `match` or `type(x) is` is asked about."""
    for node in ast.walk(ast.parse(source)):
        about: list[ast.AST] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass") and len(node.args) > 1:
            about = [node.args[1]]
        elif isinstance(node, ast.MatchClass):
            about = [node.cls]
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            about = list(node.comparators)
        for each in about:
            for part in ast.walk(each):
                if isinstance(part, ast.Name | ast.Attribute):
                    yield part.lineno, ast.unparse(part).rpartition(".")[2]


def test_the_kinds_are_found() -> None:
    assert {"QuantLinear", "QuantEmbedding", "Wrapper", "SkipBlock", "UnfusedExperts", "PackedLinear"} <= set(kinds())
    assert "CompressedModule" not in kinds()


def test_only_the_file_of_a_kind_asks_for_its_class() -> None:
    known = kinds()
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} asks for {name}"
        for path in PACKAGE.rglob("*.py")
        for line, name in asked(path.read_text(encoding="utf-8"))
        if name in known and known[name] != path
    ]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(x, QuantLinear)",
        "isinstance(x, nn.Linear | modules.QuantLinear)",
        "issubclass(kind, (nn.Linear, QuantLinear))",
        "type(x) is QuantLinear",
        "match x:\n    case QuantLinear():\n        pass",
    ],
)
def test_a_question_about_a_class_is_noticed(source: str) -> None:
    assert "QuantLinear" in {name for _, name in asked(source)}
